"""Scoring in a shard group (several processes that share one model): all sample the same, and one process scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from grpo.backend.ranks import Ranks
from grpo.errors import RunError
from grpo.scoring.scorer import Scorer
from grpo.scoring.session import Scoring
from grpo.types import Group, Task


class SharedScoring:
    """A scoring that the first process of a shard group makes and sends to the other processes."""

    def __init__(self, scorer: Scorer, scoring: Scoring | None, ranks: Ranks) -> None:
        """`scoring` is None except in the first process."""
        self._scorer, self._scoring, self._ranks = scorer, scoring, ranks

    def add(self, place: int, group: Group) -> None:
        """Take the whole group of task number `place`."""
        if self._scoring is not None:
            self._scoring.add(place, group)

    def scored(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups with their scores. See `Scorer.score`.

        Raises RunError if this process has sampled other tokens than the first process.
        """
        scored = self._ranks.told(lambda: self._scorer.score(groups, self._scoring))
        if self._scoring is None and _tokens(groups) != _tokens(scored):
            rank = self._ranks.everyone.rank
            raise RunError(
                f"process {rank} of {self._ranks.everyone.size} and process {rank - self._ranks.shard.rank} share one "
                "model but have sampled different tokens: their sums of the same numbers differ in the last bits. "
                "Please report this with the output of `grpo doctor --json`"
            )
        return scored


@contextmanager
def scoring_once(scorer: Scorer, tasks: Sequence[Task], ranks: Ranks) -> Iterator[SharedScoring]:
    """A scoring for the groups of these tasks, for a `with` block in all processes of a shard group."""
    if ranks.shard.rank:
        yield SharedScoring(scorer, None, ranks)
        return
    with scorer.open(tasks) as scoring:
        yield SharedScoring(scorer, scoring, ranks)


def _tokens(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    return [rollout.trajectory.token_ids for group in groups for rollout in group.rollouts]
