"""Older groups that are kept and replayed when groups of a step have no signal: `rollout.reuse`.

This experience replay is off-policy. The anchor of replayed rows is the logprobs of the policy that sampled them
(`Batch.stale`), so ratios, clipping and corrections are relative to that policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import cast

import mlx.core as mx

from grpo.config import RolloutConfig
from grpo.rollout import sampling_of
from grpo.training.keeping import OlderGroup, pack, unpack
from grpo.training.state import Arrays
from grpo.types import Group

TOKEN = 4 + 5
"""Bytes of a token in a kept group: 4 for its id, and about 5 for its characters in the text."""


@dataclass(frozen=True, slots=True)
class OlderGroups:
    """The groups with a signal from the last `most` steps, oldest first. Immutable: each step makes a new one.

    All processes of a run have the same groups, because they have the same groups after scoring. Every group is
    replayed at most once in a step, and so at most `most` times in all.
    """

    most: int
    kept: tuple[OlderGroup, ...] = ()

    def replayed(self, missing: int, step: int) -> tuple[list[Group], OlderGroups]:
        """Up to `missing` groups to replay in step `step`, each with its `lag`, and the kept groups with new counts.

        Groups that were replayed least often come first; among equals, the newest.
        """
        order = sorted(range(len(self.kept)), key=lambda place: (self.kept[place].replays, -place))
        chosen, counted = order[:missing], list(self.kept)
        for place in chosen:
            counted[place] = replace(counted[place], replays=counted[place].replays + 1)
        again = [_replayed(lagging(self.kept[place].group(), step)) for place in chosen]
        return again, replace(self, kept=tuple(counted))

    def after(self, step: int, groups: Iterable[Group]) -> OlderGroups:
        """The groups to keep after step `step`, which sampled these `groups` with a signal. Drops groups that are too
        old for the next step.

        A group with a NaN logprob is not kept, because replayed rows have no other anchor.
        """
        oldest = step - self.most  # oldest policy step: the next step begins with the policy after `step` steps
        recent = [one for one in self.kept if one.policy_step >= oldest]
        fresh = [OlderGroup.of(group) for group in groups if _has_anchor(group)] if self.most else []
        return replace(self, kept=(*recent, *fresh))

    def arrays(self) -> dict[str, mx.array]:
        """The kept groups as arrays for a checkpoint, bit for bit; no arrays if no groups are kept."""
        return pack(self.kept)

    def loaded(self, arrays: Arrays) -> OlderGroups:
        """The inverse of `arrays`: keeps the groups in `arrays`, or none if it is empty."""
        return replace(self, kept=unpack(arrays))


def bytes_kept(rollout: RolloutConfig, steps: int, prompt: int, length: int) -> int:
    """Maximum bytes of the groups that a run keeps, with prompts of `prompt` and completions of `length` tokens.

    The dataset's columns are not counted. A sampling filter, such as top_p, adds a column per token.
    """
    columns = 1 + sampling_of(rollout).reshaped
    of_group = TOKEN * prompt + rollout.num_generations * length * (TOKEN + 1 + 4 * columns)
    return min(rollout.reuse, steps) * rollout.prompts_per_step * of_group


def lagging(group: Group, step: int) -> Group:
    """The group with the `lag` of its completions at step `step`, whose policy has made `step - 1` steps."""
    rollouts = (replace(one, lag=step - 1 - cast(int, one.trajectory.policy_step)) for one in group.rollouts)
    return replace(group, rollouts=tuple(rollouts))


def _replayed(group: Group) -> Group:
    return replace(group, rollouts=tuple(replace(one, replayed=True) for one in group.rollouts))


def lag_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """The age of the groups that a step learns from: mean and maximum lag over completions, in steps."""
    lags = [rollout.lag for group in groups for rollout in group.rollouts]
    return {"policy_lag/mean": fmean(lags), "policy_lag/max": float(max(lags))}


def _has_anchor(group: Group) -> bool:
    """Whether every trained token has a finite logprob from the sampling policy."""
    trajectories = (rollout.trajectory for rollout in group.rollouts)
    return all(math.isfinite(p) for each in trajectories for p in each.of_trained(each.behaviour or ()))
