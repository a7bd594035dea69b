"""Rollouts of which several processes take the tasks: who takes which changes no draw."""

from __future__ import annotations

import mlx.core as mx
import pytest
from environments.test_environments import SAMPLING, TwoTurns, tasks_of

from grpo.backend.tickets import Deal
from grpo.rollout import RolloutEngine
from grpo.types import Group

KEY = mx.random.key(7)
QUESTIONS = [f"What is {i}+{i}?" for i in range(7)]


class Hand(Deal):
    """The tickets that a process will get, without an office; `late`: so many times nobody answers at once."""

    def __init__(self, begin: list[int], tickets: list[int], late: int = 0) -> None:
        super().__init__(begin)
        self.tickets, self.late, self._left, self.waited = list(tickets), late, True, 0

    def _ticket(self, wait: bool) -> int | None:
        if self.late and not wait:
            self.late -= 1
            return None
        self.waited += wait
        self._left = bool(self.tickets)
        return self.tickets.pop(0) if self.tickets else None


SPLITS = [
    (([0], [2, 3, 4, 5, 6]), ([1], [])),
    (([0], []), ([1], [2, 3, 4, 5, 6])),
    (([0, 2], [4, 6]), ([1, 3], [5])),
    (([0], [6, 3]), ([1], [4, 2, 5])),
]


def by_number(engine: RolloutEngine, tasks, hands: list[Hand], draws) -> list[Group]:
    found: dict[int, Group] = {}
    for hand in hands:
        groups = engine.rollout(tasks, 3, 1.0, draws, deal=hand)
        found |= zip(hand.taken, groups, strict=True)
        assert [group.task.index for group in groups] == hand.taken
    return [found[number] for number in range(len(tasks))]


@pytest.mark.quick_cases("True-3")
@pytest.mark.parametrize(("turns", "late"), [(False, 0), (True, 3)])
def test_who_takes_which_task_changes_nothing(make_policy, turns: bool, late: int) -> None:
    toy = make_policy(slots=4)
    tasks = tasks_of(toy, *QUESTIONS)
    engine = RolloutEngine(toy.generator, SAMPLING, TwoTurns() if turns else None)
    for draws in (KEY, list(range(50, 57))):
        alone = engine.rollout(tasks, 3, 1.0, draws)
        for split in SPLITS:
            both = by_number(engine, tasks, [Hand(*part, late=late) for part in split], draws)
            for one, other in zip(alone, both, strict=True):
                for a, b in zip(one.rollouts, other.rollouts, strict=True):
                    assert a.trajectory.token_ids == b.trajectory.token_ids
                    assert a.trajectory.trained == b.trajectory.trained
                    assert a.trajectory.behaviour == pytest.approx(b.trajectory.behaviour, abs=2e-6)


def test_a_task_is_taken_when_a_slot_is_free_and_not_before(make_policy) -> None:
    toy = make_policy(slots=6)
    tasks = tasks_of(toy, *QUESTIONS)
    engine, loads = RolloutEngine(toy.generator, SAMPLING), []
    opened = toy.generator.open

    def watched():
        made = opened()
        step = made.step
        made.step = lambda: (loads.append(made.load), step())[1]
        return made

    toy.generator.open = watched
    engine.rollout(tasks, 3, 1.0, KEY, deal=Hand([0], [1, 2, 3, 4, 5, 6]))
    assert loads[0] == 6  # the first, and another for the room that it left
    assert max(loads) <= 6 + 2
    assert min(loads[:-24]) >= 3


def test_what_is_whole_is_told_by_its_place_among_this_processs_tasks(make_policy) -> None:
    toy = make_policy(slots=3)
    tasks = tasks_of(toy, *QUESTIONS)
    told: dict[int, int] = {}
    engine = RolloutEngine(toy.generator, SAMPLING)
    hand = Hand([1], [6, 3])
    engine.rollout(tasks, 3, 1.0, KEY, whole=lambda place, group: told.setdefault(place, group.task.index), deal=hand)
    assert told == {0: 1, 1: 6, 2: 3}


class Busy(TwoTurns):
    """Begins after something that takes as long as the test says."""

    def __init__(self, futures) -> None:
        self.futures = futures

    async def rollout(self, task, sampler):
        await sampler.outside(self.futures(task))
        return await super().rollout(task, sampler)


def test_tasks_that_have_no_rows_yet_take_up_room(make_policy) -> None:
    from concurrent.futures import Future
    from threading import Timer

    toy = make_policy(slots=6)
    tasks, begun = tasks_of(toy, *QUESTIONS), []

    def resets(task) -> Future:
        future: Future = Future()
        begun.append(task.index)
        if len(begun) == 2:
            Timer(0.2, lambda: seen.append(len(begun))).start()
        Timer(0.4 if len(begun) <= 2 else 0.0, future.set_result, [None]).start()
        return future

    seen: list[int] = []
    engine = RolloutEngine(toy.generator, SAMPLING, Busy(resets))
    engine.rollout(tasks, 3, 1.0, KEY, deal=Hand([0], [1, 2, 3, 4, 5, 6]))
    assert seen == [2]
    assert len(begun) == 7
