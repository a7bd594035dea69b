"""What flows between rooms. Everything here is frozen: a room that changes something returns a new object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import mlx.core as mx

Message = dict[str, str]
Prompt = str | list[Message]
FinishReason = Literal["stop", "length", "repetition"]


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


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model answered: token ids, the stop token included, and never re-encoded.

    `logprobs` are fp32, of the sampled tokens, at the sampling temperature; None where none were asked for.
    `text` is the decoded completion without special tokens. `sampler_logprobs` are those of the distribution that was
    really sampled, where a filter or a penalty made it another one; else None.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    text: str
    finish_reason: FinishReason
    sampler_logprobs: tuple[float, ...] | None = None


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
    """A completion and what became of it.

    `scores` are the raw values by reward name, None where a reward gave none, and `failures` says by name which of them
    failed; `extras` is what rewards had to add by `log_extra`, and `logged` what those that were called for this
    completion alone told by `log_metric`: the mean of all that was told under a name. `reward` is the weighted sum of
    scores, None where none scored it or one that counts `failed` on it; `penalty` is taken off it before advantages
    are; `advantage` is 0 until the objective has set it.
    """

    completion: Completion
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
class Batch:
    """Rows that go through the model together: B completions of T tokens, of P prompts of L tokens.

    prompt_ids [P, L] int32, padded on the right, and prompt_lengths [P] int32.
    prompt_index [B] int32: which prompt each row is of.
    completion_ids [B, T] int32 and mask [B, T] float32 (1 on the completion's tokens, its stop token included).
    advantages [B] float32.
    weights [B, T] float32: the normaliser, fixed over the whole step before it was split; 0 where the mask is.
    sampling_logprobs [B, T] float32; old_logprobs, ref_logprobs the same, or None where the settings need none.
    beta [] float32: the weight of the KL penalty at this step, where there is one.
    sampler_logprobs [B, T] float32: under the distribution really sampled, where filters made it another one.
    entropies [B, T] float32, in nats: the whole policy's before the step, where the update drops numbers; else None.
    """

    prompt_ids: mx.array
    prompt_lengths: mx.array
    prompt_index: mx.array
    completion_ids: mx.array
    mask: mx.array
    advantages: mx.array
    weights: mx.array
    sampling_logprobs: mx.array
    old_logprobs: mx.array | None = None
    ref_logprobs: mx.array | None = None
    beta: mx.array | None = None
    sampler_logprobs: mx.array | None = None
    entropies: mx.array | None = None

    @property
    def real_rows(self) -> int:
        """How many rows are completions: padding follows them, and has an empty mask."""
        rows: Any = (self.mask.sum(axis=1) > 0).sum().item()
        return int(rows)

    def arrays(self) -> dict[str, mx.array]:
        """The fields that are set, as a tree that `mx.compile` takes."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in fields.items() if value is not None}


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
