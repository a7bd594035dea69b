"""A source of one's own under the trainer, and tasks that share a prompt."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.given import Given
from grpo.runs.prepare import prepare
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Task


class Recorder:
    """A source that gives the tasks of another and keeps what it is told."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks, self.observed = tasks, []

    def take(self, n: int) -> list[Task]:
        return list(self.tasks[:n])

    def observe(self, groups: Sequence[Group]) -> None:
        self.observed.append(groups)

    def metrics(self) -> dict[str, float]:
        return {"curriculum/data/hard": 3.0}

    def state(self) -> dict[str, int]:
        return {"steps": len(self.observed)}

    def load_state(self, state: dict[str, int]) -> None:
        self.observed = [None] * state["steps"]


@pytest.fixture
def prepared(recipe):
    def make(*overrides: str):
        run = prepare(load_recipe(recipe, overrides))
        run.trainer.tasks = Recorder(run.tasks)
        return run.trainer

    return make


def test_a_source_observes_each_step_once_with_all_that_was_sampled(prepared) -> None:
    """Two groups are uniform, and are sampled anew: of the two, one has variance."""
    trainer = prepared("rollout.dynamic_sampling=1")
    calls = iter([[1, 1, 1, 1] * 2, [1, 1, 1, 1, 0, 1, 1, 1]])
    trainer.scorer = Scorer({"digits": lambda **_: next(calls)})
    metrics = trainer.step(1)
    (groups,) = trainer.tasks.observed
    rewards = sorted([rollout.reward for rollout in group.rollouts] for group in groups)
    assert rewards == [[0, 1, 1, 1], [1] * 4, [1] * 4, [1] * 4]
    assert metrics.values["num_prompts"] == 4
    assert all(rollout.advantage == 0 for group in groups for rollout in group.rollouts)
    assert metrics.values["curriculum/data/hard"] == 3
    assert "dropped_prompts" not in metrics.values


def test_a_replayed_group_is_not_observed_again(prepared) -> None:
    """The second step's own groups are uniform: it learns from those of the first, and has sampled its own."""
    trainer = prepared("rollout.reuse=2")
    calls = iter([[1, 0, 1, 1, 0, 0, 0, 1], [1] * 8])
    trainer.scorer = Scorer({"digits": lambda **_: next(calls)})
    trainer.step(1)
    assert trainer.step(2).values["reuse/groups"] == 2
    assert [[group.rollouts[0].trajectory.policy_step for group in groups] for groups in trainer.tasks.observed] == [
        [0, 0],
        [1, 1],
    ]


def test_its_state_is_in_the_trainers(prepared) -> None:
    trainer, again = prepared(), prepared()
    trainer.step(1)
    assert trainer.state().counts["tasks"] == {"steps": 1}
    again.load_state(trainer.state())
    assert again.tasks.state() == {"steps": 1}


def test_two_rows_with_one_prompt_are_graded_and_stored_as_two_tasks(recipe, run_cli) -> None:
    rows = [{"question": "What is 2+2?", "answer": answer} for answer in ("4", "5")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("own.py").write_text(
        "def reward(prompts, completions, answer, **kwargs):\n    return [float(a == '4') for a in answer]\n"
    )
    trainer = prepare(
        load_recipe(recipe, ["data.source=rows.jsonl", "data.prompt=question", "rewards=[{use: own.py:reward}]"])
    ).trainer
    groups = trainer.step(1).groups
    graded = {group.task.identity: {rollout.reward for rollout in group.rollouts} for group in groups}
    assert graded == {("data", 0): {1.0}, ("data", 1): {0.0}}


class Forgetful:
    """A source that has no state to keep, and says nothing of it."""

    def take(self, n: int) -> list[Task]:
        return []

    def observe(self, groups: Sequence[Group]) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}


def test_a_source_that_lacks_a_method_is_refused_before_the_first_step(recipe) -> None:
    said = r"source Forgetful: it has no state\(\), load_state\(\)\. .* returns \{\} and ignores"
    with pytest.raises(UserError, match=said):
        prepare(load_recipe(recipe), Given(source=lambda stream: Forgetful()))
