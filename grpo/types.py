"""What flows between rooms. Everything here is frozen: a room that changes something returns a new object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import mlx.core as mx

Message = dict[str, str]
Prompt = str | list[Message]
FinishReason = Literal["stop", "length", "repetition"]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Task:
    """One row of a dataset, ready to be sampled from.

    `prompt` is what rewards see (text, or chat messages with `data.system` before them), `prompt_ids` what the model
    sees. `columns` is the whole row: rewards receive its values by name. `source` is where the row comes from: the
    recipe's section (`data` or `eval`), or the name of a source.
    """

    index: int
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    columns: Mapping[str, Any]
    source: str = "data"

    @property
    def identity(self) -> tuple[str, int]:
        """Which task this is: (source, index). Two rows with the same prompt and other answers are two tasks."""
        return self.source, self.index


BEHAVIOUR, SAMPLER = "behaviour", "sampler"
"""Columns of a trajectory; see there."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Everything that followed a task's prompt, as token ids: never decoded and encoded again.

    `trained` is true for the tokens that the policy sampled and learns from, the stop token included. Other tokens (a
    tool's answer, say) may stand anywhere between them; the model sees them, and nothing counts them or learns from
    them. `columns` are floats for each token, by name:

        behaviour   log p of the policy that sampled: fp32, at the sampling temperature. Absent where nobody asked.
        sampler     log p of the distribution that was really sampled, where filters or a penalty made it another one

    What a column holds for an untrained token means nothing, and may be NaN. `text` is the decoded completion without
    special tokens. `policy_step` is the number of training steps that the policy that sampled had made; None outside
    of training. Raises ValueError where `trained` or a column has another length than `token_ids`.
    """

    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    columns: Mapping[str, tuple[float, ...]]
    text: str
    finish_reason: FinishReason
    policy_step: int | None = None

    def __post_init__(self) -> None:
        for name, values in (("trained", self.trained), *self.columns.items()):
            if len(values) != len(self.token_ids):
                raise ValueError(f"{name} has {len(values)} values for {len(self.token_ids)} tokens")

    @classmethod
    def sampled(
        cls,
        token_ids: tuple[int, ...],
        behaviour: tuple[float, ...] | None,
        text: str,
        finish_reason: FinishReason,
        sampler: tuple[float, ...] | None = None,
    ) -> Trajectory:
        """A single answer of the model: every token was sampled, and is trained. None: there is no such column."""
        known = {BEHAVIOUR: behaviour, SAMPLER: sampler}
        columns = {name: values for name, values in known.items() if values is not None}
        return cls(token_ids, (True,) * len(token_ids), columns, text, finish_reason)

    @property
    def trained_tokens(self) -> int:
        """How many tokens are trained: what every length, limit, rate and denominator counts."""
        return self.trained.count(True)

    @property
    def behaviour(self) -> tuple[float, ...] | None:
        """The column of this name; None without it."""
        return self.columns.get(BEHAVIOUR)

    @property
    def sampler(self) -> tuple[float, ...] | None:
        """The column of this name; None without it."""
        return self.columns.get(SAMPLER)

    def of_trained(self, values: Sequence[Value]) -> list[Value]:
        """Those of the values, one for each token, that belong to trained tokens."""
        return list(compress(values, self.trained))


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a reward function has no score for a completion that it should have one for."""

    kind: Literal["error", "timeout"]
    error: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.error}"


Progress = Callable[[str, int, int], None]
"""Progress callback `(phase, done, total)`. Phases are `rollout` and `evaluation` (in tokens; `total` is the most that
there can be), `reward` (in completions) and `update` (in micro-batches)."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A trajectory and what became of it.

    `scores` are the raw values by reward name, None where a reward gave none, and `failures` says by name which of them
    failed; `extras` is what rewards had to add by `log_extra`, and `logged` what those that were called for this
    completion alone told by `log_metric`: the mean of all that was told under a name. `reward` is the weighted sum of
    scores, None where none scored it or one that counts `failed` on it; `penalty` is taken off it before advantages
    are; `advantage` is 0 until the objective has set it.
    """

    trajectory: Trajectory
    scores: Mapping[str, float | None] = field(default_factory=dict)
    failures: Mapping[str, Failure] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    logged: Mapping[str, float] = field(default_factory=dict)
    failed: bool = False
    reward: float | None = None
    penalty: float = 0.0
    advantage: float = 0.0


@dataclass(frozen=True, slots=True)
class Group:
    """The completions of one prompt, which share a baseline."""

    task: Task
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class Totals:
    """What was sampled, counted once and before anything is left out: completions, and their trained tokens.

    Denominators and metrics go by these numbers, and never by what a filter has left.
    """

    rows: int
    tokens: int

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Totals:
        lengths = [rollout.trajectory.trained_tokens for group in groups for rollout in group.rollouts]
        return cls(len(lengths), sum(lengths))


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that go through the model together: B trajectories of T tokens, of P prompts of L tokens.

    prompt_ids `[P, L]` int32, padded on the right, and prompt_lengths `[P]` int32.
    prompt_index `[B]` int32: which prompt each row is of.

    Everything else is a column of the rows' tokens, `[B, T]` and float32 (token_ids: int32), padded on the right:

        token_ids    what followed the prompt
        trained      the mask: 1 on tokens that are learned from, else 0. There may be zeros anywhere.
        weights      the normalizer, fixed over the whole step before it was split; 0 where `trained` is
        advantages   of each token; the same for all tokens of a row, today
        behaviour    log p of the policy that sampled
        sampler      log p of the distribution that was really sampled, where filters made it another one; else None
        anchor       log p of the policy before this step's first update: what ratios are to. None: it is the current
                     policy, and all ratios are 1
        reference    log p of the reference; None where no penalty needs it
        entropies    in nats, of the policy that is the anchor, where the update drops numbers; else None

    beta `[]` float32 is the weight of the KL penalty at this step; None where the loss has no penalty now.

    The logprobs are at the sampling temperature. Where `trained` is 0 they may be anything, NaN included.
    """

    prompt_ids: mx.array
    prompt_lengths: mx.array
    prompt_index: mx.array
    token_ids: mx.array
    trained: mx.array
    weights: mx.array
    advantages: mx.array
    behaviour: mx.array | None = None
    sampler: mx.array | None = None
    anchor: mx.array | None = None
    reference: mx.array | None = None
    beta: mx.array | None = None
    entropies: mx.array | None = None

    def arrays(self) -> dict[str, mx.array]:
        """The fields that are set, by name: `mx.compile` takes trees of lists, tuples and dicts, and no dataclass."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def of(cls, arrays: Mapping[str, mx.array]) -> Batch:
        """The batch that `arrays` are of."""
        return cls(**arrays)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one training step measured, by TRL's names.

    `groups` are all that were sampled; those that were learnt from come first, with their advantages.
    """

    step: int
    values: Mapping[str, float]
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True, slots=True)
class EvalMetrics:
    """One evaluation on `n` held-out prompts, by the reward `grader`.

    `values` holds `greedy`, `avg@k`, `pass@k` and `maj@k`, which are fractions, and `rewards/<name>`, mean scores;
    `intervals` their 95 % intervals (low, high). `failed_gradings` counts completions that the grader failed on: not
    right, for all that is known.
    """

    step: int
    n: int
    grader: str
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    failed_gradings: int = 0
