"""Groups that were sampled ahead for the next step, and the metrics of sampling and scoring them."""

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
    """One sampler's share of a step: its scored groups, and the metrics of sampling and scoring them.

    numbers    index of each group's task in the step
    drafted    counts of speculative decoding
    failures   number of completions that have failed so far, by metric
    scoring    the scorer's own metrics
    seconds    duration of each phase
    """

    groups: list[Group]
    numbers: list[int]
    drafted: Mapping[str, float]
    failures: Mapping[str, float]
    scoring: Mapping[str, float]
    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Ahead:
    """The scored groups of a future step, in the order of its tasks.

    told     metrics of sampling and scoring
    seconds  duration of each phase, in the slowest sampler
    """

    groups: tuple[Group, ...]
    told: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Sequence[Sampled], scorer: Scorer) -> Ahead:
        """Combine the samplers' shares. Rewards' logged metrics come from the first sampler; failures are summed."""
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
        """The groups as arrays for a checkpoint, bit for bit, without the values that rewards logged."""
        return pack([OlderGroup.of(group) for group in self.groups])

    def plain(self) -> dict[str, Any]:
        """Everything else, as data for JSON."""
        logged = [[dict(rollout.logged) for rollout in group.rollouts] for group in self.groups]
        return {"told": dict(self.told), "seconds": dict(self.seconds), "logged": logged}

    @classmethod
    def loaded(cls, arrays: Arrays, plain: Mapping[str, Any], scorer: Scorer) -> Ahead:
        """The inverse of `arrays` and `plain`."""
        groups = [
            replace(group, rollouts=tuple(map(_logging, group.rollouts, logged)))
            for group, logged in zip((one.group() for one in unpack(arrays)), plain["logged"], strict=True)
        ]
        return cls(tuple(with_rewards(groups, scorer.weights)), plain["told"], plain["seconds"])


def _logging(rollout: Rollout, logged: Mapping[str, float]) -> Rollout:
    return replace(rollout, logged=logged)


def _sums(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(each[name] for each in counts) for name in counts[0]}
