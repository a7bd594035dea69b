"""`grpo.advantages`, `grpo.Loss` and `grpo.batches`: from scored groups to the batches of an update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import mlx.core as mx

from grpo import presets
from grpo.backend.device import on_gpu
from grpo.config import AdvantageConfig, LossConfig
from grpo.door.checks import groups_of, kind_of
from grpo.errors import UserError
from grpo.objective.advantages import advantages as advantages_of
from grpo.recipes import with_settings
from grpo.training.batches import make_batches
from grpo.training.lanes import parts_for
from grpo.training.packing import GPU_MULTIPLE, Packing
from grpo.types import Batch, Group

AT_ONCE = 4096
"""Default number of tokens in a micro-batch."""


class Loss(LossConfig):
    """A loss: `grpo.Loss("dapo", epsilon_high=0.3, beta=0.01)`.

    The name is a published variant: grpo (arXiv 2402.03300), bnpo, dr_grpo (2503.20783), dapo (2503.14476), gspo
    (2507.18071), gspo_token, cispo (2506.13585), sapo (2511.20347), luspo (2602.05261), vespo (2602.10693), gmpo
    (2507.20673), dppo (2602.04879), reinforce++ (2501.03262) or rloo (2402.14740). The settings are the settings of a
    recipe's section `loss` (`grpo recipes schema loss`); they override the paper's values. Formulas: grpo/presets.py.

    Raises UserError for a variant or setting that does not exist, is out of bounds, or has no effect with the others.

    >>> grpo.Loss("gspo", epsilon=1e-3).preset.ratio
    'sequence'
    """

    def __init__(self, type: presets.PresetName = "dapo", **settings: Any) -> None:
        checked = with_settings(LossConfig(), {"type": type, **settings}, "grpo.Loss")
        super().__init__(**dict(checked))


@dataclass(frozen=True, slots=True)
class BatchList(Sequence[Batch]):
    """The micro-batches of one update, and the loss for which their token weights were computed."""

    items: tuple[Batch, ...]
    loss: LossConfig

    @overload
    def __getitem__(self, place: int) -> Batch: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Batch]: ...
    def __getitem__(self, place: int | slice) -> Batch | Sequence[Batch]:
        return self.items[place]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.items)


def advantages(groups: Sequence[Group], **settings: Any) -> list[Group]:
    """Return the groups with `advantage` in their rollouts: the reward minus its baseline, divided by a deviation.

    `settings` are the settings of a recipe's section `advantage`. `scale_rewards`: "group" (default; σ of the group +
    1e-4, arXiv 2402.03300), "batch" (arXiv 2508.08221) or "none" (Dr. GRPO, arXiv 2503.20783). `baseline`: "group"
    (default), "leave_one_out" (RLOO, arXiv 2402.14740), "batch" (REINFORCE++, arXiv 2501.03262) or "maxrl". A rollout
    whose reward is None (no score, or a failed function) gets advantage 0, and does not count in its group's baseline.

    Raises UserError for an unknown setting, for groups without scores or of different sizes, and for settings that need
    more than the sum of the rewards, such as the baseline "gdpo": use `grpo.Trainer` for them.

    >>> groups = grpo.advantages(groups, scale_rewards="none")
    >>> [rollout.advantage for rollout in groups[0].rollouts]
    [0.5, -0.5]
    """
    cfg = with_settings(AdvantageConfig(), settings, "grpo.advantages")
    more = {"baseline: gdpo": cfg.baseline == "gdpo", "turns: turn": cfg.turns == "turn"}
    more["soft_overlong_cache"] = cfg.soft_overlong_cache is not None
    if any(more.values()):
        name = next(name for name, wanted in more.items() if wanted)
        raise UserError(f"grpo.advantages: {name} needs more than the sum of the rewards: use grpo.Trainer")
    groups = groups_of(groups, "grpo.advantages")
    if groups and not _scored(groups):
        raise UserError(f"grpo.advantages: {UNSCORED}")
    sizes = {len(group.rollouts) for group in groups}
    if len(sizes) > 1:
        raise UserError(
            f"grpo.advantages: groups have {min(sizes)} to {max(sizes)} rollouts, but all must have the same number"
        )
    if not groups:
        return []
    rewards = [[_number(rollout.reward)] for group in groups for rollout in group.rollouts]
    values: Any = advantages_of(mx.array(rewards), mx.array([1.0]), sizes.pop(), cfg).tolist()
    each = iter(values)
    return [replace(g, rollouts=tuple(replace(r, advantage=next(each)) for r in g.rollouts)) for g in groups]


def batches(
    groups: Iterable[Group],
    loss: LossConfig | presets.PresetName | None = None,
    *,
    micro_batch_tokens: int = AT_ONCE,
    max_completion_length: int | None = None,
) -> BatchList:
    """Return groups with advantages as the micro-batches of one update.

    `loss` (a `grpo.Loss`, or its name; default: `grpo.Loss()`) determines how tokens are averaged. Each token's weight
    is fixed here, over all groups, and stored in `Batch.weights`, so the sum of the micro-batches' losses and gradients
    does not depend on the split. A micro-batch has at most `micro_batch_tokens` tokens (a longer row gets its own).
    Rows that cannot have a gradient are left out; the denominators still count them. `max_completion_length`, in
    tokens, is the divisor of a loss with a constant normalizer ("dr_grpo").

    Each completion is one row. On a GPU, `grpo.Trainer` may pack several completions into a row instead
    (`optim.pack_completions`): the same gradient except for rounding, with less padding.

    The arrays of a batch are `[B, T]`, B rows of T tokens, float32 except int32 `token_ids`; see `grpo.Batch`.

    Raises UserError for groups sampled without logprobs (at another temperature than the policy's), for groups without
    scores or without advantages, and for a loss with a constant normalizer without `max_completion_length`.

    >>> batches = grpo.batches(groups, loss=grpo.Loss("dapo"))
    >>> batches[0].token_ids.shape == batches[0].advantages.shape
    True
    """
    groups, loss = groups_of(groups, "grpo.batches"), _as_loss(loss)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if any(rollout.trajectory.behaviour is None for rollout in rollouts):
        raise UserError("grpo.batches: these groups have no logprobs: sample them at the policy's own temperature")
    if rollouts and not any(rollout.has_advantage for rollout in rollouts):
        _refuse_unfinished(groups)
    if loss.preset.normalize == "constant" and max_completion_length is None:
        raise UserError(f"grpo.batches: {loss.type} divides by a constant: pass max_completion_length, in tokens")
    size = max((len(group.rollouts) for group in groups), default=1)
    parts = parts_for(loss)
    rows = -(-max(1, len(rollouts)) // parts)
    packing = Packing(micro_batch_tokens, rows, size, GPU_MULTIPLE if on_gpu() else 1, parts=parts)
    return BatchList(tuple(make_batches(groups, loss, packing, max_completion_length or 0, beta=loss.beta)), loss)


def _number(reward: float | None) -> float:
    return math.nan if reward is None else reward


UNSCORED = "these groups have no scores: call groups = grpo.score(groups, rewards) first"


def _scored(groups: Sequence[Group]) -> bool:
    """Whether any rollout has a reward, a score, or a failure."""
    return any(r.reward is not None or r.scores or r.failures for group in groups for r in group.rollouts)


def _refuse_unfinished(groups: Sequence[Group]) -> None:
    """Raise UserError if groups have only zero advantages because a call is missing. Zero advantages can be right: all
    rewards of a group may be equal, or have failed."""
    if not _scored(groups):
        raise UserError(f"grpo.batches: {UNSCORED}, and then grpo.advantages(groups)")
    if any(rollout.advantage for group in groups for rollout in advantages([group])[0].rollouts):
        raise UserError(
            "grpo.batches: these groups have different scores, but no advantages: call groups = "
            "grpo.advantages(groups) first (the baseline maxrl gives no advantages if a group's mean reward is not "
            "above 0)"
        )


def _as_loss(loss: Any) -> LossConfig:
    if loss is None or isinstance(loss, LossConfig):
        return loss or Loss()
    if isinstance(loss, str):
        return Loss(loss)  # type: ignore[arg-type]  # the schema refuses unknown names
    if callable(loss):
        raise UserError(
            "grpo.batches: loss is a function, but batches need a grpo.Loss, which determines how tokens are averaged: "
            "pass the function to policy.gradient or policy.update"
        )
    raise UserError(f"grpo.batches: loss: expected a grpo.Loss or its name, got {kind_of(loss)}")
