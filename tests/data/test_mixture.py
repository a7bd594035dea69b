"""Draws of several sources: by their ratios, whatever is taken at once, and the same after a resume."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from grpo.config import CurriculumConfig, DataConfig
from grpo.data.curriculum import Curriculum
from grpo.data.mixture import Mixture
from grpo.data.prompts import PromptReader
from grpo.data.solved import Solved
from grpo.data.source import Source, checked_source
from grpo.data.stream import TaskStream
from grpo.errors import UserError
from grpo.types import Group, Rollout, Task, Trajectory

RATIOS = {"math": 5.0, "code": 3.0, "chat": 2.0}


def stream(name: str, rows: int = 7) -> TaskStream:
    return TaskStream(
        [{"prompt": f"{name} {n}"} for n in range(rows)], PromptReader(DataConfig(source="rows"), name), 0
    )


def mixture(seed: int = 0, **sources: Source) -> Mixture:
    return Mixture({name: sources.get(name) or stream(name) for name in RATIOS}, RATIOS, seed)


def curriculum(name: str) -> Curriculum:
    return Curriculum(stream(name), CurriculumConfig(), Solved(["right"]), 0)


def group(task: Task, score: float) -> Group:
    made = Trajectory.sampled((1,), None, "", "stop")
    return Group(task, (Rollout(made, scores={"right": score}),))


def test_a_hundred_thousand_draws_follow_the_ratios() -> None:
    """χ² with 2 degrees of freedom is below 13.8 with a probability of 0.999; 2 sources in a row are independent."""
    source = mixture(seed=1)
    names = [task.source for task in source.take(100_000)]
    expected = {name: ratio * 10_000 for name, ratio in RATIOS.items()}
    counts = Counter(names)
    assert sum((counts[name] - n) ** 2 / n for name, n in expected.items()) < 13.8
    pairs = Counter(zip(names[::2], names[1::2], strict=True))
    both = {(a, b): RATIOS[a] * RATIOS[b] * 500 for a in RATIOS for b in RATIOS}
    assert sum((pairs[pair] - n) ** 2 / n for pair, n in both.items()) < 26.1  # 8 degrees of freedom


def test_it_does_not_matter_how_many_tasks_are_taken_at_once() -> None:
    whole, parts = mixture(), mixture()
    assert [task for n in (1, 5, 0, 17, 40) for task in parts.take(n)] == whole.take(63)
    assert [one.identity for one in mixture(seed=1).take(63)] != [one.identity for one in mixture().take(63)]


def test_each_source_goes_through_its_own_epochs() -> None:
    tasks = mixture().take(200)
    for name in RATIOS:
        own = [task.index for task in tasks if task.source == name]
        assert own == [task.index for task in stream(name).take(len(own))]
        assert sorted(own[:7]) == list(range(7))


@pytest.mark.parametrize("pooled", [(), ("code",), tuple(RATIOS)])
def test_a_mixture_that_loads_a_state_goes_on_to_the_bit(pooled: tuple[str, ...]) -> None:
    def step(source: Mixture, n: int) -> list[Task]:
        tasks = source.take(5)
        source.observe([group(task, (task.index + n) % 3 / 2) for task in tasks])
        return tasks

    whole = mixture(**{name: curriculum(name) for name in pooled})
    steps = [step(whole, n) for n in range(20)]
    first = mixture(**{name: curriculum(name) for name in pooled})
    assert [step(first, n) for n in range(8)] == steps[:8]
    state = first.state()
    kept = json.dumps(state)
    first.take(9)
    assert json.dumps(state) == kept, "a state does not change after it was taken"
    second = mixture(**{name: curriculum(name) for name in pooled})
    second.load_state(json.loads(kept))
    assert [step(second, n) for n in range(8, 20)] == steps[8:]
    assert second.metrics() == whole.metrics()


def test_each_source_observes_its_own_groups_and_tells_its_own_metrics() -> None:
    source = mixture(code=curriculum("code"), chat=curriculum("chat"))
    tasks = source.take(12)
    source.observe([group(task, 1.0) for task in tasks if task.source != "chat"])
    told = source.metrics()
    tried = {task.index for task in tasks if task.source == "code"}
    assert told["curriculum/code/easy"] == len(tried) > 0
    assert told["curriculum/chat/easy"] == 0
    assert told["curriculum/code/drawn/unseen"] == 1
    assert told["sources/math/epoch"] == sum(task.source == "math" for task in tasks) / 7
    assert {"dropped_prompts", "sources/code/dropped_prompts"} <= set(told)
    assert "curriculum/math/easy" not in told


def test_rows_that_are_left_out_are_counted_by_source_and_together() -> None:
    rows: list[dict[str, Any]] = [{"prompt": None}, {"prompt": "a"}]
    streams = [TaskStream(rows, PromptReader(DataConfig(source="rows"), name), 0) for name in ("math", "code")]
    source = mixture(math=streams[0], code=streams[1])
    source.take(100)
    told = source.metrics()
    assert told["sources/math/dropped_prompts"] == streams[0].dropped > 0
    assert told["dropped_prompts"] == streams[0].dropped + streams[1].dropped


def test_a_source_that_is_new_begins_and_one_that_has_gone_is_forgotten() -> None:
    before = Mixture({name: stream(name) for name in ("math", "gone")}, {"math": 1.0, "gone": 1.0}, 0)
    before.take(10)
    after = mixture()
    after.load_state(before.state())
    state = after.state()
    assert state["draws"] == 10
    assert state["sources"]["math"] == before.state()["sources"]["math"]
    assert state["sources"]["code"] == {"cursor": 0, "dropped": 0}
    after.load_state({"cursor": 3, "dropped": 0})  # of a run with one source
    assert after.state()["draws"] == 0


class Odd:
    """A sampler that gives other tasks than those of its stream, or not as many as were asked for."""

    def __init__(self, tasks: list[Task]) -> None:
        self.tasks = tasks

    def take(self, n: int) -> list[Task]:
        return self.tasks * n

    def observe(self, groups: object) -> None: ...
    def metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: object) -> None: ...


def test_a_sampler_s_tasks_have_to_be_of_its_source() -> None:
    task = Task(0, "a", (), {}, "other")
    with pytest.raises(UserError, match=r"the sampler of 'code' gave a task of the source 'other'"):
        mixture(code=Odd([task])).take(20)
    with pytest.raises(UserError, match=r"the sampler of 'code' must give \d+ tasks, but gave 0"):
        mixture(code=Odd([])).take(20)


def test_a_sampler_is_told_of_its_own_groups_alone() -> None:
    heard: list[object] = []
    own = Odd([])
    own.observe = heard.extend  # type: ignore[method-assign, assignment]
    groups = [group(Task(0, "a", (), {}, name), 1.0) for name in ("math", "code", "chat")]
    mixture(code=own).observe(groups)
    assert heard == groups[1:2]


def test_a_mixture_is_a_source() -> None:
    source = mixture()
    assert checked_source(source) is source
