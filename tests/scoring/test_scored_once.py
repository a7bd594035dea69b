"""Of the processes that hold a model together one scores, and the others are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from grpo.backend.ranks import Ranks
from grpo.errors import RunError
from grpo.scoring.scorer import Scorer
from grpo.scoring.sharing import scoring_once
from grpo.types import Group, Rollout, Task, Trajectory

TASK = Task(0, "?", (1, 2), {})


def group(*token_ids: int) -> Group:
    return Group(TASK, (Rollout(Trajectory.sampled(token_ids, (-1.0,) * len(token_ids), "text", "stop")),))


class Holders(Ranks):
    """One of two processes; the other has said `said` already."""

    def __init__(self, rank: int, said: Any = None) -> None:
        super().__init__()
        self.rank, self.size, self._said = rank, 2, said
        self._shard = self
        self.told_others: list[Any] = []

    def gather(self, mine: Any) -> list[Any]:
        self.told_others.append(mine)
        return [self._said, mine] if self.rank else [mine, self._said]


def scored(ranks: Ranks, *groups: Group) -> list[Group]:
    calls = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        calls.append(completions)
        return [0.5] * len(completions)

    with scoring_once(Scorer({"r": reward}), [TASK] * len(groups), ranks) as scoring:
        for place, one in enumerate(groups):
            scoring.add(place, one)
        found = scoring.scored(groups)
    assert bool(calls) == (ranks.rank == 0)
    return found


def test_the_first_scores_and_tells_the_others() -> None:
    first = Holders(0)
    (found,) = scored(first, group(3, 4))
    assert found.rollouts[0].scores == {"r": 0.5}
    assert first.told_others == [([found], None)]
    assert scored(Holders(1, ([found], None)), group(3, 4)) == [found]


def test_what_one_process_sampled_otherwise_ends_the_run() -> None:
    other = replace(group(3, 4), task=TASK)
    with pytest.raises(
        RunError, match="process 1 of 2 and process 0 share one model but have sampled different tokens"
    ):
        scored(Holders(1, ([other], None)), group(3, 5))


def test_a_reward_that_raises_in_the_first_ends_the_others_too() -> None:
    class Broken(Scorer):
        def score(self, *_: Any) -> list[Group]:
            raise RunError("a broken reward")

    first = Holders(0)
    with pytest.raises(RunError, match="a broken reward"), scoring_once(Broken({}), [TASK], first) as scoring:
        scoring.scored([group(3)])
    (said,) = first.told_others
    with pytest.raises(RunError, match="process 0 of 2: a broken reward"):
        scored(Holders(1, said), group(3))
