"""Older groups, kept to be learnt from again where a step's own groups teach nothing: `rollout.reuse`.

Such experience replay is off-policy: the loss has the logprobs of the policy that sampled as the anchor of these rows
(`Batch.stale`), so that ratios, bounds and corrections are to that policy.
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
"""Bytes of a token in a kept group: its id, and its characters in the text, which are five or so."""


@dataclass(frozen=True, slots=True)
class OlderGroups:
    """The groups with signal of the last `most` steps, oldest first. A value: a step makes the next from it.

    All processes of a run hold the same, because they hold the same groups after scoring. Every group is replayed at
    most once in a step, and so `most` times in all.
    """

    most: int
    kept: tuple[OlderGroup, ...] = ()

    def replayed(self, missing: int, step: int) -> tuple[list[Group], OlderGroups]:
        """At most `missing` groups for step `step`, each with its `lag`, and what is kept with these counted.

        Those that were replayed least often come first, and of these the newest.
        """
        order = sorted(range(len(self.kept)), key=lambda place: (self.kept[place].replays, -place))
        chosen, counted = order[:missing], list(self.kept)
        for place in chosen:
            counted[place] = replace(counted[place], replays=counted[place].replays + 1)
        again = [_replayed(lagging(self.kept[place].group(), step)) for place in chosen]
        return again, replace(self, kept=tuple(counted))

    def after(self, step: int, groups: Iterable[Group]) -> OlderGroups:
        """What is kept after step `step`, which sampled these `groups` with signal: none too old for the next step.

        A group whose sampler gave NaN for a token is not kept: a stale row has no other anchor.
        """
        oldest = step - self.most  # of policies: the next step learns with the policy after `step` steps
        recent = [one for one in self.kept if one.policy_step >= oldest]
        fresh = [OlderGroup.of(group) for group in groups if _has_anchor(group)] if self.most else []
        return replace(self, kept=(*recent, *fresh))

    def arrays(self) -> dict[str, mx.array]:
        """All of it for a checkpoint, to the bit; none if nothing is kept."""
        return pack(self.kept)

    def loaded(self, arrays: Arrays) -> OlderGroups:
        """The same from `arrays`; nothing is kept if there are none."""
        return replace(self, kept=unpack(arrays))


def bytes_kept(rollout: RolloutConfig, steps: int, prompt: int, length: int) -> int:
    """Bytes that a run of so many steps keeps at most, with prompts of `prompt` tokens and completions of `length`.

    Counted without the dataset's columns. A filter, such as top_p, gives tokens one more column.
    """
    columns = 1 + sampling_of(rollout).reshaped
    of_group = TOKEN * prompt + rollout.num_generations * length * (TOKEN + 1 + 4 * columns)
    return min(rollout.reuse, steps) * rollout.prompts_per_step * of_group


def lagging(group: Group, step: int) -> Group:
    """The group as step `step` learns from it, whose policy has made `step - 1` steps."""
    rollouts = (replace(one, lag=step - 1 - cast(int, one.trajectory.policy_step)) for one in group.rollouts)
    return replace(group, rollouts=tuple(rollouts))


def _replayed(group: Group) -> Group:
    return replace(group, rollouts=tuple(replace(one, replayed=True) for one in group.rollouts))


def lag_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """How old the groups that a step learns from are: mean and maximum over completions, in steps."""
    lags = [rollout.lag for group in groups for rollout in group.rollouts]
    return {"policy_lag/mean": fmean(lags), "policy_lag/max": float(max(lags))}


def _has_anchor(group: Group) -> bool:
    """Whether the policy that sampled gave a number for every trained token."""
    trajectories = (rollout.trajectory for rollout in group.rollouts)
    return all(math.isfinite(p) for each in trajectories for p in each.of_trained(each.behaviour or ()))
