"""Environments: what they sample with, many turns, and what goes wrong in them."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

import mlx.core as mx
import pytest
from docs.pagerun import block

from grpo.environments.driver import Driver
from grpo.environments.environment import find_environment
from grpo.environments.single import SingleTurn
from grpo.errors import RunError, UserError
from grpo.generation.events import Events
from grpo.generation.generator import Request
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import Task, Trajectory

KEY = mx.random.key(7)
SAMPLING = Sampling(1.0, 24)


def tasks_of(toy, *questions: str) -> list[Task]:
    return [Task(i, text, tuple(toy.tokenizer.encode(text)), {}) for i, text in enumerate(questions)]


QUESTIONS = ("What is 3+4?", "What is 12+1?", "Why?")


class TwoTurns:
    """Every row that ends is told something, and goes on; each by itself."""

    said = (5, 6, 7)

    async def rollout(self, task, sampler):
        rows = sampler.begin(task.prompt_ids, sampler.n, keep=True)
        return await sampler.gather(*(self.play(row, sampler) for row in rows))

    async def play(self, row, sampler) -> Trajectory:
        first = await sampler.ended(row)
        if row.room < len(self.said):
            return first
        answer = await sampler.extend(row, self.said)
        sampler.release(row)
        return answer


class Outside(TwoTurns):
    """What it says comes from a thread."""

    def __init__(self, threads) -> None:
        self.threads = threads

    async def play(self, row, sampler) -> Trajectory:
        first = await sampler.ended(row)
        said = await sampler.outside(self.threads.submit(lambda: self.said))
        return await sampler.extend(row, said) if row.room >= len(said) else first


def trajectories(engine: RolloutEngine, tasks, n: int = 3, draws=KEY) -> list[list[Trajectory]]:
    groups = engine.rollout(tasks, n, 1.0, draws)
    assert [group.task for group in groups] == list(tasks)
    return [[rollout.trajectory for rollout in group.rollouts] for group in groups]


@pytest.mark.parametrize("seeded", [False, True])
def test_a_single_turn_is_what_the_generator_samples(make_policy, seeded: bool) -> None:
    toy = make_policy(slots=4)
    tasks = tasks_of(toy, *QUESTIONS)
    seeds = [11, 12, 13] if seeded else [None] * 3
    requests = [Request(task.prompt_ids, 3, seed) for task, seed in zip(tasks, seeds, strict=True)]
    expected = toy.generator.generate(requests, SAMPLING, KEY)
    engine = RolloutEngine(toy.generator, SAMPLING)
    assert trajectories(engine, tasks, draws=seeds if seeded else KEY) == expected


def test_a_second_turn_goes_on_after_tokens_that_are_not_trained(make_policy) -> None:
    """Each row is its first turn, what it was told, and another turn."""
    toy = make_policy()
    tasks = tasks_of(toy, *QUESTIONS)
    first = trajectories(RolloutEngine(toy.generator, SAMPLING), tasks)
    both = trajectories(RolloutEngine(toy.generator, SAMPLING, TwoTurns()), tasks)
    extended = 0
    for one, other in zip(chain(*first), chain(*both), strict=True):
        begin = len(one.token_ids)
        assert other.token_ids[:begin] == one.token_ids
        if len(other.token_ids) > begin:
            extended += 1
            assert other.token_ids[begin : begin + 3] == TwoTurns.said
            assert other.trained == (True,) * begin + (False,) * 3 + (True,) * (len(other.token_ids) - begin - 3)
            assert len(other.token_ids) > begin + 3
            assert other.text == toy.tokenizer.decode(other.token_ids, skip_special_tokens=True)
            assert other.text.startswith(one.text + toy.tokenizer.decode(list(TwoTurns.said)))
    assert extended >= 2


def test_draws_depend_neither_on_slots_nor_on_what_is_awaited_when(make_policy) -> None:
    with ThreadPoolExecutor(2) as threads:
        found = []
        for slots, environment in ((64, TwoTurns()), (1, TwoTurns()), (3, Outside(threads))):
            toy = make_policy(slots=slots)
            engine = RolloutEngine(toy.generator, SAMPLING, environment)
            found.append([[t.token_ids for t in group] for group in trajectories(engine, tasks_of(toy, *QUESTIONS))])
    assert found[0] == found[1] == found[2]


def test_the_environment_of_the_manual(make_policy) -> None:
    space: dict = {}
    exec(block("extending.md", "python", "class Twice"), space)
    toy = make_policy()
    tasks = tasks_of(toy, *QUESTIONS)
    found = trajectories(RolloutEngine(toy.generator, SAMPLING, space["Twice"]()), tasks)
    asked = toy.tokenizer.encode(" Sure?", add_special_tokens=False)
    spans = [[i for t, i in zip(one.trained, one.token_ids, strict=True) if not t] for one in chain(*found)]
    assert asked in spans
    assert all(span in ([], asked) for span in spans)


class Parts:
    """Several prompts for one task, as an environment has that rewrites its history."""

    def __init__(self, *parts: int) -> None:
        self.parts = parts

    async def rollout(self, task, sampler):
        return [answer for part in self.parts for answer in await sampler.sample(task.prompt_ids, 1, part)]


def test_each_part_of_a_task_draws_by_itself(make_policy) -> None:
    toy = make_policy()
    tasks = tasks_of(toy, *QUESTIONS[:2])
    engine = RolloutEngine(toy.generator, SAMPLING, Parts(0, 1, 2))
    (first, second, third), others = trajectories(engine, tasks)
    assert len({t.token_ids for t in (first, second, third, *others)}) == 6
    engine.environment = Parts(2, 0, 1)
    assert trajectories(engine, tasks)[0] == [third, first, second]
    engine.environment = Parts(0, 1, 1)
    with pytest.raises(RunError, match="part 1 of this task has begun already"):
        engine.rollout(tasks, 3, 1.0, KEY)


class Elsewhere:
    async def rollout(self, task, sampler):
        return await sampler.sample((*task.prompt_ids, 9), sampler.n)


def test_rows_begin_after_the_task_s_prompt(make_policy) -> None:
    """They are trained on as what followed that."""
    toy = make_policy()
    with pytest.raises(RunError, match=r"a row must begin with task\.prompt_ids"):
        RolloutEngine(toy.generator, SAMPLING, Elsewhere()).rollout(tasks_of(toy, "?"), 2, 1.0, KEY)


def test_a_group_has_as_many_trajectories_as_it_should(make_policy) -> None:
    toy = make_policy()
    engine = RolloutEngine(toy.generator, SAMPLING, Parts(0, 1))
    with pytest.raises(
        RunError, match="environment Parts, row 0 of data: it returned 2 trajectories, but a group has 3"
    ):
        engine.rollout(tasks_of(toy, "?"), 3, 1.0, KEY)


class Broken:
    """Breaks on the second task. `left` are the tasks whose rollouts were left before their end."""

    def __init__(self) -> None:
        self.left: list[int] = []

    async def rollout(self, task, sampler):
        if task.index == 1:
            raise ZeroDivisionError("by hand")
        try:
            return await sampler.sample(task.prompt_ids, sampler.n)
        except GeneratorExit:
            self.left.append(task.index)
            raise


def test_what_an_environment_raises_ends_the_rollout_and_says_where(make_policy) -> None:
    toy, whole = make_policy(), []
    engine = RolloutEngine(toy.generator, SAMPLING, Broken())
    with pytest.raises(ZeroDivisionError) as error:
        engine.rollout(tasks_of(toy, *QUESTIONS), 2, 1.0, KEY, whole=lambda *group: whole.append(group))
    assert error.value.__notes__ == ["in the environment Broken, on row 1 of data"]
    assert whole == []  # nobody decodes on for a rollout that has failed
    assert engine.environment.left == [0]  # the third had not begun
    engine.environment = SingleTurn()
    assert len(engine.rollout(tasks_of(toy, *QUESTIONS), 2, 1.0, KEY)) == 3


class Keeping:
    """Keeps its rows, and never lets go of them."""

    def __init__(self) -> None:
        self.rows = []

    async def rollout(self, task, sampler):
        rows = sampler.begin(task.prompt_ids, sampler.n, keep=True)
        self.rows += rows
        return [await sampler.ended(row) for row in rows]


def test_rows_that_nobody_released_are_freed_at_the_end(make_policy) -> None:
    toy = make_policy()
    engine = RolloutEngine(toy.generator, SAMPLING, Keeping())
    engine.rollout(tasks_of(toy, *QUESTIONS), 2, 1.0, KEY)
    states = [row.state for row in engine.environment.rows]
    assert set(states) <= {"done", "released"}
    assert "released" in states  # those that could have gone on


class Busy:
    """An engine with so many steps to do, in which nothing happens."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def busy(self) -> bool:
        return self.left > 0

    def step(self) -> Events:
        self.left -= 1
        return Events()

    def close(self) -> None: ...


def test_work_outside_that_is_done_is_taken_up_while_others_decode() -> None:
    engine, future, seen = Busy(steps=5), Future(), []

    async def waits() -> None:
        seen.append((await driver.jobs.outside(future), engine.left))

    with Driver(engine, None, SAMPLING) as driver:
        driver.jobs.start(waits())
        driver.run(lambda: future.set_result("done") if engine.left == 3 else None)
    assert seen == [("done", 3)]


class Stuck:
    async def rollout(self, task, sampler):
        (row,) = sampler.begin(task.prompt_ids, 1)
        sampler.release(row)
        return [await sampler.ended(row)]


def test_waiting_for_what_never_comes_is_an_error_and_no_hang(make_policy) -> None:
    toy = make_policy()
    with pytest.raises(RunError, match="environment Stuck, row 0 of data: it waits for a row that does not decode"):
        RolloutEngine(toy.generator, SAMPLING, Stuck()).rollout(tasks_of(toy, "?"), 1, 1.0, KEY)


@pytest.mark.parametrize("slots", [2, 64])
def test_a_group_is_whole_as_soon_as_its_last_row_ends(make_policy, slots: int) -> None:
    """Of one group all rows have ended when it is told of, and others still decode."""
    toy, told = make_policy(slots=slots), []
    tasks = tasks_of(toy, *QUESTIONS)
    engine = RolloutEngine(toy.generator, replace(SAMPLING, max_tokens=12))
    step, steps = type(toy.generator.open()).step, []

    def counted(self):
        steps.append(self)
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(toy.generator.open()), "step", counted)
        groups = engine.rollout(tasks, 2, 1.0, KEY, whole=lambda place, group: told.append((place, group, len(steps))))
    assert sorted(place for place, _, _ in told) == [0, 1, 2]
    assert all(groups[place] == group for place, group, _ in told)
    if slots == 2:  # one group after the other
        assert [place for place, _, _ in told] == [0, 1, 2]
        lengths = [max(len(r.trajectory.token_ids) for r in group.rollouts) for group in groups]
        assert told[0][2] < told[1][2] < told[2][2] == len(steps)
        assert told[0][2] <= lengths[0] + 1
    else:
        ends = {place: at for place, _, at in told}
        longest = [max(len(r.trajectory.token_ids) for r in group.rollouts) for group in groups]
        assert sorted(ends, key=lambda place: ends[place]) == sorted(ends, key=lambda place: (longest[place], place))


MINE = """
class Mine:
    async def rollout(self, task, sampler):
        return await sampler.sample(task.prompt_ids, sampler.n)
class Lazy:
    pass
class Costly:
    def __init__(self, price):
        pass
"""


def test_environments_by_name_and_by_file(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    assert type(find_environment(f"{file}:Mine")).__name__ == "Mine"
    for name, said in (
        ("mine", "write file.py:Class, .*or package.module:Class"),
        (f"{file}:Lazy", "Lazy has no method rollout"),
        (f"{file}:Costly", "it cannot be made: TypeError"),
        (f"{file}:Nobody", "no class 'Nobody' in it"),
    ):
        with pytest.raises(UserError, match=said):
            find_environment(name)
