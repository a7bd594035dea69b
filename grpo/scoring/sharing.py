"""Scoring where several processes hold one model between them: they sample the same, and one of them scores it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from grpo.backend.ranks import Ranks
from grpo.errors import RunError
from grpo.scoring.scorer import Scorer
from grpo.scoring.session import Scoring
from grpo.types import Group, Task


class SharedScoring:
    """A scoring that the first process of a shard group makes, and the others are told of."""

    def __init__(self, scorer: Scorer, scoring: Scoring | None, ranks: Ranks) -> None:
        """`scoring` is the first process's; the others have none."""
        self._scorer, self._scoring, self._ranks = scorer, scoring, ranks

    def add(self, place: int, group: Group) -> None:
        """The group of task number `place` is whole."""
        if self._scoring is not None:
            self._scoring.add(place, group)

    def scored(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups with their scores. See `Scorer.score`.

        Raises RunError where this process has sampled other tokens than the first one.
        """
        scored = self._ranks.told(lambda: self._scorer.score(groups, self._scoring))
        if self._scoring is None and _tokens(groups) != _tokens(scored):
            rank = self._ranks.everyone.rank
            raise RunError(
                f"process {rank} of {self._ranks.everyone.size} has sampled other tokens than process "
                f"{rank - self._ranks.shard.rank}, with which it holds the model: their sums of the same numbers "
                "differ in the last bits. Please report it, with `grpo doctor --json`"
            )
        return scored


@contextmanager
def scoring_once(scorer: Scorer, tasks: Sequence[Task], ranks: Ranks) -> Iterator[SharedScoring]:
    """A scoring of the groups that these tasks will have, for a `with` block in all processes of a shard group."""
    if ranks.shard.rank:
        yield SharedScoring(scorer, None, ranks)
        return
    with scorer.open(tasks) as scoring:
        yield SharedScoring(scorer, scoring, ranks)


def _tokens(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    return [rollout.trajectory.token_ids for group in groups for rollout in group.rollouts]
