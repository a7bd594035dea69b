"""Runs whose tasks are drawn by their solve rates, or by a class that the recipe names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs.driver import run, same_end
from telemetry.pages import data_in, plots_in

import grpo
from grpo.data.loading import load_rows
from grpo.data.rates import SolveRates
from grpo.data.solved import Solved
from grpo.data.stream import TaskStream
from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.drawing import solved_by
from grpo.runs.given import Given
from grpo.runs.prepare import prepare
from grpo.runs.resume import changes, context, context_now

POOLED = ("data.curriculum={hard: 0.5, hard_threshold: 0.1, easy_threshold: 0.2}", "optim.steps=5")


def stop_after(step: int):
    """Have a run end after a step."""

    def change(trainer, stop) -> None:
        make = trainer.step

        def stepped(n: int):
            made = make(n)
            if n == step:
                stop.ask()
            return made

        trainer.step = stepped

    return change


def told(folder: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_draws_and_learns_as_if_it_had_never_stopped(recipe, run_cli) -> None:
    """With replaced groups too; the report then shows the pools."""
    settings = (*POOLED, "rollout.dynamic_sampling=1", "checkpoint.every=5")
    run(recipe, "output_dir=whole", *settings)
    run(recipe, "output_dir=parts", *settings, change=stop_after(2))
    assert len(told("parts")) == 2
    run(recipe, "output_dir=parts", *settings, resume=True)
    same_end(Path("whole"), Path("parts"))
    pools = [line["curriculum/unseen"] for line in told("whole")]
    assert pools[0] < 4
    assert pools == sorted(pools, reverse=True)
    assert run_cli("report", "whole").code == 0
    plots = plots_in(data_in((Path("whole") / "report.html").read_text()))
    rates, draws = (plots["Curriculum", title] for title in ("Tasks by solve rate", "Draws by pool"))
    assert ["curriculum/drawn/normal", "normal (above 0.1, to 0.2)"] in draws["series"]
    assert rates["series"][1] == ["curriculum/solve_rate/10", "0.1 to 0.2"]
    assert rates["series"][-1] == ["curriculum/unseen", "no rate yet"]
    assert (rates["shades"], draws["shades"], rates["run"]) == (True, False, 0)
    assert sum(value for name, value in told("whole")[-1].items() if "solve_rate" in name) == 4 - pools[-1]


def test_groups_that_dynamic_sampling_replaces_are_observed(recipe) -> None:
    Path("zero.py").write_text("def reward(completions, **columns):\n    return [0.0] * len(completions)\n")
    overrides = ["data.curriculum={}", "rollout.dynamic_sampling=3", "rewards=[{use: zero.py:reward}]"]
    trainer = prepare(load_recipe(recipe, overrides)).trainer
    metrics = trainer.step(1)
    tried = {group.task.index for group in metrics.groups}
    assert len(metrics.groups) == 8 > 2
    assert metrics.values["curriculum/hard"] == len(tried)
    assert sum(metrics.values[f"curriculum/drawn/{pool}"] for pool in ("hard", "normal", "easy", "unseen")) == 1


@pytest.mark.parametrize("where", ["data", "data.sources.0"])
def test_a_run_without_a_task_to_begin_with_is_refused_by_its_rehearsal(recipe, run_cli, where: str) -> None:
    """And so before the first evaluation, not at the first step."""
    sources = "data={sources: [{source: train.jsonl, prompt: '{question}'}]}" if "sources" in where else "optim.steps=2"
    ran = run_cli("train", recipe, "--dry-run", sources, f"{where}.curriculum={{unseen: 0}}")
    assert ran.code == 2
    assert "no task is left to draw: all pools with tasks (4 unseen) have the weight 0" in ran.err
    assert "all checks passed" not in ran.out


def test_the_first_reward_says_what_is_solved_or_the_one_that_is_named(recipe) -> None:
    Path("two.py").write_text(
        "def one(completions, **columns):\n    return [1.0] * len(completions)\n"
        "def none(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    rewards = "rewards=[{use: 'two.py:one', weight: 0.1}, {use: 'two.py:none'}]"
    for named, pool in (("", "easy"), ("reward: none", "hard")):
        values = prepare(load_recipe(recipe, [f"data.curriculum={{{named}}}", rewards])).trainer.step(1).values
        assert values[f"curriculum/{pool}"] == 4 - values["curriculum/unseen"] > 0


def test_a_sampler_is_found_beside_the_recipe_and_hashed(recipe) -> None:
    folder = recipe.parent / "deep"
    folder.mkdir()
    (folder / "toy.yaml").write_text(recipe.read_text() + "")
    code = (
        "class Firsts:\n    def __init__(self, stream):\n        self.stream = stream\n"
        "    def take(self, n):\n        return [self.stream.task(0)] * n\n    def observe(self, groups): ...\n"
        "    def metrics(self):\n        return {}\n    def state(self):\n        return {}\n"
        "    def load_state(self, state): ...\n"
    )
    (folder / "mine.py").write_text(code)
    cfg = load_recipe(folder / "toy.yaml", ["data.sampler=mine.py:Firsts"])
    assert Path(cfg.data.sampler.partition(":")[0]).is_absolute()
    assert [task.index for task in prepare(cfg).trainer.tasks.take(3)] == [0, 0, 0]
    written = context(cfg, {}, {}, {}, {})
    (folder / "mine.py").write_text(code.replace("task(0)", "task(1)"))
    assert context_now(cfg, written).sources != written.sources


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("class Mine:\n    pass\n", "calling it with the stream of tasks failed"),
        ("class Mine:\n    def __init__(self, stream):\n        raise ValueError('odd')\n", "ValueError: odd|odd"),
        ("def Mine(stream):\n    return None\n", "it returned None"),
        ("class Mine:\n    def __init__(self, stream): ...\n    def take(self, n): ...\n", "it has no observe"),
        ("class Other:\n    pass\n", "no function or class 'Mine' in it"),
    ],
)
def test_a_sampler_that_is_none_is_refused_before_the_first_step(recipe, code: str, said: str) -> None:
    Path("mine.py").write_text(code)
    with pytest.raises(UserError, match=said):
        prepare(load_recipe(recipe, ["data.sampler=mine.py:Mine"]))


def test_a_source_that_is_given_takes_the_place_of_a_sampler_and_not_of_a_curriculum(recipe) -> None:
    given = Given(source=lambda stream: stream)
    assert isinstance(prepare(load_recipe(recipe, ["data.sampler=away.py:Gone"]), given).trainer.tasks, TaskStream)
    with pytest.raises(UserError, match=r"data\.curriculum does nothing with source"):
        prepare(load_recipe(recipe, ["data.curriculum={}"]), given)


def test_what_training_leaves_out_is_still_evaluated_and_a_changed_file_of_rates_is_noticed(recipe) -> None:
    rows = load_rows(load_recipe(recipe).data)
    SolveRates.of({0: 0.0, 2: 0.5, 3: 1.0}, rows, {}).write(Path("rates.jsonl"))
    chosen = ["data.solve_rates=rates.jsonl", "data.solve_rate=[0.4, 1]", "data.curriculum={}"]
    cfg = load_recipe(recipe, [*chosen, "eval={split: train, samples: 2}"])
    run = prepare(cfg)
    assert {task.prompt for task in run.trainer.tasks.take(20)} == {"What is 3+3?", "What is 4+4?"}
    assert len(run.evaluator.tasks) == 4
    sizes = run.trainer.tasks.metrics()
    assert [sizes[f"curriculum/{pool}"] for pool in ("hard", "normal", "easy", "unseen")] == [0, 1, 1, 0]
    written = context(cfg, {}, {}, {}, run.rows)
    assert changes(written, context_now(cfg, written)) == []
    SolveRates.of({0: 0.0, 2: 0.5, 3: 0.9}, rows, {}).write(Path("rates.jsonl"))  # the same rows are kept
    (line,) = changes(written, context_now(cfg, written))
    assert line.startswith("contents of data.solve_rates")


TALK = """
class Half:
    def reset(self, **row):
        return " Sure?"
    def step(self, text):
        return None
    def get_reward(self):
        return 0.5
"""


def test_an_environment_s_own_reward_says_how_far_a_task_is_solved(recipe) -> None:
    Path("talk.py").write_text(TALK)
    overrides = ["rewards=[]", "environment={use: 'talk.py:Half', workers: 1}", "rollout.max_completion_length=48"]
    run_ = prepare(load_recipe(recipe, [*overrides, "data.curriculum={}"]))
    with run_.opened:
        values = run_.trainer.step(1).values
    assert values["curriculum/normal"] == 4 - values["curriculum/unseen"] > 0
    assert solved_by(run_.trainer.scorer) == Solved(("Half",), own=True)


def test_a_reward_that_does_not_apply_leaves_a_task_where_it_is(recipe) -> None:
    Path("two.py").write_text(
        "def one(completions, **columns):\n    return [1.0] * len(completions)\n"
        "def none(completions, **columns):\n    return [None] * len(completions)\n"
    )
    rewards = "rewards=[{use: 'two.py:none'}, {use: 'two.py:one'}]"
    trainer = prepare(load_recipe(recipe, ["data.curriculum={}", rewards])).trainer
    assert trainer.step(1).values["curriculum/unseen"] == 4


def test_tasks_without_a_run_have_no_curriculum() -> None:
    with pytest.raises(UserError, match=r"grpo\.tasks: curriculum learns from scores"):
        grpo.tasks([{"prompt": "2+2?"}], curriculum={})
