"""What was sampled for the next step: its groups, and what sampling and scoring them had to tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo.generation.tally import speculation_metrics
from grpo.objective.groups import with_rewards
from grpo.scoring.scorer import Scorer
from grpo.training.keeping import OlderGroup, pack, unpack
from grpo.training.state import Arrays
from grpo.types import Group, Rollout


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampler's share: its scored groups, and what there is to tell of them.

    numbers    those of the groups' tasks in the step
    drafted    what speculation did, as counts
    failures   completions that failed so far, by metric
    scoring    the scorer's own metrics
    seconds    of each phase
    """

    groups: list[Group]
    numbers: list[int]
    drafted: Mapping[str, float]
    failures: Mapping[str, float]
    scoring: Mapping[str, float]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Ahead:
    """The scored groups of a step that is still to be made, in the order of its tasks, the metrics that sampling and
    scoring gave, and the seconds of the slowest sampler in each phase."""

    groups: tuple[Group, ...]
    told: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Sequence[Sampled], scorer: Scorer) -> Ahead:
        """The samplers' shares together, whoever sampled which task. Rewards log what they log in the first sampler,
        failures are added up."""
        by_number = {n: group for part in parts for n, group in zip(part.numbers, part.groups, strict=True)}
        groups = scorer.agreed([by_number[number] for number in sorted(by_number)])
        told = {
            **speculation_metrics(_sums([part.drafted for part in parts])),
            **parts[0].scoring,
            **_sums([part.failures for part in parts]),
        }
        seconds = {phase: max(part.seconds[phase] for part in parts) for phase in parts[0].seconds}
        return cls(tuple(with_rewards(groups, scorer.weights)), told, seconds)

    def arrays(self) -> Arrays:
        """The groups for a checkpoint, to the bit, without what rewards logged."""
        return pack([OlderGroup.of(group) for group in self.groups])

    def plain(self) -> dict[str, Any]:
        """The rest, as JSON holds it."""
        logged = [[dict(rollout.logged) for rollout in group.rollouts] for group in self.groups]
        return {"told": dict(self.told), "seconds": dict(self.seconds), "logged": logged}

    @classmethod
    def loaded(cls, arrays: Arrays, plain: Mapping[str, Any], scorer: Scorer) -> Ahead:
        """What `arrays` and `plain` were taken of."""
        groups = [
            replace(group, rollouts=tuple(map(_logging, group.rollouts, logged)))
            for group, logged in zip((one.group() for one in unpack(arrays)), plain["logged"], strict=True)
        ]
        return cls(tuple(with_rewards(groups, scorer.weights)), plain["told"], plain["seconds"])


def _logging(rollout: Rollout, logged: Mapping[str, float]) -> Rollout:
    return replace(rollout, logged=logged)


def _sums(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in counts) for name in counts[0]}
