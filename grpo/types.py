"""The types that rooms exchange. All are frozen: code that changes something returns a new object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, compress, pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from grpo.alarm import Alarm

if TYPE_CHECKING:
    import mlx.core as mx

Message = dict[str, Any]
"""A chat message: `role` and `content`; an assistant's message may have `tool_calls`, a tool's message has `name`."""
Prompt = str | list[Message]
FinishReason = Literal[
    "stop",
    "length",
    "repetition",
    "done",
    "max_turns",
    "max_tool_calls",
    "max_turn_tokens",
    "rollout_timeout",
    "failed",
]
"""Why a completion ended: the model stopped (`stop`), the environment ended it (`done`), it repeated itself
(`repetition`), the environment failed (`failed`), or it reached the limit of this name (`length`: the completion's
length)."""
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Task:
    """One row of a dataset, with its prompt rendered and tokenized.

    Rewards see `prompt` (text, or chat messages, `data.system` first); the model sees `prompt_ids`. `columns` is the
    whole row, and rewards receive its values by name. `source` names where the row comes from: `data` or `eval`, the
    section of the recipe, or a name that a `Source` chose.
    """

    index: int
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    columns: Mapping[str, Any]
    source: str = "data"

    @property
    def identity(self) -> tuple[str, int]:
        """(source, index). Two rows with the same prompt but different answers are two tasks."""
        return self.source, self.index


BEHAVIOUR, SAMPLER = "behaviour", "sampler"
"""The names of a trajectory's columns. `Trajectory` defines them."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages and rewards of a completion with several turns. The trajectory has its tokens.

    environment    the name of the environment; `tools` if there are only tools
    prompt         the messages before the first turn, with what the environment's `reset` added
    messages       the messages after the prompt: the model's, tool results and the environment's
    turn_rewards   for each of the model's turns, the reward that its steps gave; None if they gave none
    outcome        what the environment's `get_reward` returned; None if it has none, or did not score
    calls          number of tool calls, of which `failed_calls` failed: unknown tools, wrong arguments, exceptions
    failure        why the environment failed; None if it did not
    home           the seat of the environment until the completion is scored; None afterwards
    metrics        metrics that an agent returned, by name
    """

    environment: str
    prompt: tuple[Message, ...]
    messages: tuple[Message, ...]
    turn_rewards: tuple[float | None, ...] = ()
    outcome: float | None = None
    calls: int = 0
    failed_calls: int = 0
    failure: Failure | None = None
    home: Any = field(default=None, compare=False, repr=False)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def reward(self) -> float | None:
        """The environment's own reward: the sum of `turn_rewards` and `outcome`; None if it gave neither."""
        given = [reward for reward in (*self.turn_rewards, self.outcome) if reward is not None]
        return sum(given) if given else None

    def __reduce__(self) -> tuple[type[Conversation], tuple[Any, ...]]:
        """Pickle everything except `home`, which is valid only in this process."""
        return Conversation, tuple(None if name == "home" else getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """All tokens after a task's prompt, exactly as they were sampled: text is never encoded again.

    `trained` marks the tokens that the policy sampled and learns from, the stop token included. Untrained tokens, such
    as a tool's answer, may be anywhere; the model reads them, but no length, mean or gradient includes them.

    `columns` holds named floats, one per token:

        behaviour   log p under the policy that sampled, fp32, at the sampling temperature; absent if not requested
        sampler     log p under the distribution that was drawn from; present only where filters (top-k, top-p, min-p),
                    a repetition penalty or `min_tokens` changed that distribution

    The values at untrained tokens are meaningless and may be NaN.

    `text` is all tokens decoded without special tokens: every turn, and the environment's messages between turns. It
    ends before the stop string that ended the last turn. `policy_step` is the number of training steps of the policy
    that sampled; None outside training. `conversation` has the messages of several turns; None for a single answer.

    `begins` has the indices of tokens at which the conversation continued in a new row (`environment.thinking: drop`).
    A new row follows the group's prompt instead of the tokens before it: first the tokens that the model read again,
    which are not trained, then the tokens that it sampled. `parts` are these rows.

    Raises ValueError if `trained` or a column differs from `token_ids` in length.
    """

    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    columns: Mapping[str, tuple[float, ...]]
    text: str
    finish_reason: FinishReason
    policy_step: int | None = None
    conversation: Conversation | None = None
    begins: tuple[int, ...] = ()

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
        """A trajectory of sampled tokens only, all of them trained. A column that is None is left out."""
        given = {BEHAVIOUR: behaviour, SAMPLER: sampler}
        columns = {name: values for name, values in given.items() if values is not None}
        return cls(token_ids, (True,) * len(token_ids), columns, text, finish_reason)

    @property
    def truncated(self) -> bool:
        """Whether a limit, a repetition or a failure ended the completion, rather than the model or its environment."""
        return self.finish_reason not in ("stop", "done")

    @property
    def parts(self) -> tuple[Trajectory, ...]:
        """The rows to train on, each of which follows the group's prompt: the trajectory itself, or the rows that
        `begins` separates."""
        if not self.begins:
            return (self,)
        spans = [slice(*edges) for edges in pairwise((0, *self.begins, len(self.token_ids)))]
        return tuple(
            replace(
                self,
                token_ids=self.token_ids[span],
                trained=self.trained[span],
                columns={name: values[span] for name, values in self.columns.items()},
                begins=(),
            )
            for span in spans
        )

    @property
    def turns(self) -> int:
        """Number of the model's turns: runs of trained tokens, separated by untrained tokens."""
        return max(self.turns_begun, default=0)

    @property
    def turns_begun(self) -> tuple[int, ...]:
        """Number of turns that have begun up to and including each token."""
        return tuple(accumulate(int(here and not before) for before, here in pairwise((False, *self.trained))))

    @property
    def trained_tokens(self) -> int:
        """The number of trained tokens. Every length, limit, rate and denominator uses it."""
        return self.trained.count(True)

    @property
    def behaviour(self) -> tuple[float, ...] | None:
        """The column `behaviour`, or None."""
        return self.columns.get(BEHAVIOUR)

    @property
    def sampler(self) -> tuple[float, ...] | None:
        """The column `sampler`, or None."""
        return self.columns.get(SAMPLER)

    def of_trained(self, values: Sequence[Value]) -> list[Value]:
        """The values at trained tokens; `values` has one entry per token."""
        return list(compress(values, self.trained))


FailureKind = Literal["error", "timeout", "crash", "memory"]
FAILURES: tuple[FailureKind, ...] = ("error", "timeout", "crash", "memory")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a reward function failed to score a completion, or why its environment failed.

    A score of None without a failure means "not applicable". `kind` is one of `FAILURES`: an exception or an invalid
    answer, a timeout, the death of the process, or too much memory.
    """

    kind: FailureKind
    error: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.error}"


@dataclass(frozen=True, slots=True)
class Rollout:
    """A trajectory with its scores.

    scores      the raw score of each reward and of each environment, by name; None for no score
    failures    the failures of rewards on this completion, and of the environment, by name
    extras      values that rewards recorded with `log_extra`
    logged      values that rewards recorded with `log_metric` in a call for only this completion; the mean of several
    failed      whether a reward with a nonzero weight or the environment failed
    reward      the weighted sum of the scores; None if no reward scored the completion, or if `failed`
    penalty     subtracted from the reward before advantages are computed
    advantage   0 until the objective sets it
    taught      whether a teacher gives each token a signal, regardless of the advantage
    turn_advantages   with `advantage.turns: turn`, the advantage of each of the model's turns, used instead of
                `advantage`. `advantage` is then the first turn's, which includes all rewards of the conversation
    lag         training steps between the policy that sampled and the policy that learns. 0 unless `rollout.reuse`
                replays the group, or other processes sampled it ahead (`ranks`)
    replayed    whether `rollout.reuse` took it from an earlier step, which sampled and counted it
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
    taught: bool = False
    turn_advantages: tuple[float, ...] | None = None
    lag: int = 0
    replayed: bool = False

    @property
    def has_advantage(self) -> bool:
        """Whether any token has a nonzero advantage."""
        return any(self.turn_advantages) if self.turn_advantages is not None else self.advantage != 0


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one task, which share a baseline."""

    task: Task
    rollouts: tuple[Rollout, ...]

    @property
    def lag(self) -> int:
        """Training steps between the policy that sampled the group and the policy that learns from it."""
        return max((rollout.lag for rollout in self.rollouts), default=0)

    @property
    def replayed(self) -> bool:
        """Whether an earlier step sampled the group, and `rollout.reuse` replays it."""
        return any(rollout.replayed for rollout in self.rollouts)


@dataclass(frozen=True, slots=True)
class Totals:
    """Numbers of sampled completions and trained tokens, before any filter; denominators and metrics use them."""

    rows: int
    tokens: int

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Totals:
        lengths = [rollout.trajectory.trained_tokens for group in groups for rollout in group.rollouts]
        return cls(len(lengths), sum(lengths))


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch: B trajectories of up to T tokens, with P shared prompts of up to L tokens.

        prompt_ids       `[P, L]` int32, padded on the right
        prompt_lengths   `[P]` int32
        prompt_index     `[B]` int32: the prompt of each row

    The columns have one value per token, `[B, T]`, padded on the right; `token_ids` is int32, the others float32:

        token_ids    the tokens after the prompt
        trained      the mask: 1 on tokens to learn from, else 0. Zeros may be anywhere in a row.
        weights      the normalizer: each token's share of the loss, fixed before the update was split into
                     micro-batches; 0 wherever `trained` is 0
        advantages   the row's advantage, or the turn's advantage, on each trained token; 0 elsewhere
        behaviour    log p under the policy that sampled
        sampler      log p under the distribution that was drawn from; None unless filters changed it
        stale        1 on the tokens that an earlier step's policy sampled, else 0; None if this step's policy sampled
                     all tokens. The loss uses `behaviour` instead of `anchor` for stale tokens.
        anchor       log p under the policy before this step's first update, the denominator of the ratios. None: the
                     current policy is still that policy, and the ratios of tokens that are not stale are 1.
        reference    log p under the reference policy; None if no KL penalty needs it
        teacher      log p under the teacher, whose advantages are in `advantages`; None unless `kl: sampled`
        entropies    of the anchor, in nats, without dropout; None unless the update applies dropout

    `beta` `[]` float32 is the weight of the KL penalty at this step; None if the loss has no penalty now. The teacher's
    fields are None without a teacher in the loss: `teacher_coef` `[]` float32, the weight of its KL; `teacher_hidden`
    `[B, T, D]`, its hidden states (`kl: exact`); `teacher_ids` `[B, T, k]` int32, its most likely tokens, and
    `teacher_logprobs` `[B, T, k + 1]` float32, log p of these tokens and of all other tokens together (`kl: top_k`).

    `lines` and `starts`, int32, say how rows are packed one after another for the model: `[5, R, W]` (`[3, R, W]` if
    each line has one row) and `[B]` (`grpo.model.lines`). None: each row is a separate line, after its prompt.
    All logprobs are at the sampling temperature. Where `trained` is 0, they may be anything, NaN included.
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
    stale: mx.array | None = None
    anchor: mx.array | None = None
    reference: mx.array | None = None
    teacher: mx.array | None = None
    beta: mx.array | None = None
    entropies: mx.array | None = None
    lines: mx.array | None = None
    starts: mx.array | None = None
    teacher_coef: mx.array | None = None
    teacher_hidden: mx.array | None = None
    teacher_ids: mx.array | None = None
    teacher_logprobs: mx.array | None = None

    def arrays(self) -> dict[str, mx.array]:
        """The arrays by field name, without None: `mx.compile` accepts dicts, but not dataclasses."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def of(cls, arrays: Mapping[str, mx.array]) -> Batch:
        """The inverse of `arrays`."""
        return cls(**arrays)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The metrics of one training step, under TRL's names, and every group that the step sampled.

    The groups that the step trained on come first in `groups`, with their advantages. They include older groups that
    the step replayed, with `replayed` set.
    """

    step: int
    values: Mapping[str, float]
    groups: tuple[Group, ...] = ()
    alarms: tuple[Alarm, ...] = ()
    """Alarms that this step raised."""

    @property
    def sampled(self) -> tuple[Group, ...]:
        """The groups that the step sampled, without older groups that it replayed."""
        return tuple(group for group in self.groups if not group.replayed)


@dataclass(frozen=True, slots=True)
class EvalMetrics:
    """One evaluation on `n` held-out prompts, graded by the reward `grader`.

    `values` holds the fractions `greedy`, `avg@k`, `pass@k` and `maj@k`, and the mean scores `rewards/<name>`;
    `intervals` holds their 95 % intervals (low, high). `failed_gradings` is the number of completions on which the
    grader failed, which count as wrong.
    """

    step: int
    n: int
    grader: str
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    failed_gradings: int = 0
    alarms: tuple[Alarm, ...] = ()
