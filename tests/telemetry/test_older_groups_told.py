"""Older groups that a step replayed are marked, and no part of what is shown as its samples."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from telemetry.pages import data_in, rows_in

from grpo.config.log import CompletionsConfig
from grpo.runs.completions import store_completions
from grpo.telemetry.recorded import read_run
from grpo.telemetry.replayed import print_replay
from grpo.telemetry.report import report
from grpo.telemetry.sent import best_of
from grpo.telemetry.tensorboard import TensorboardLogger
from grpo.telemetry.weights_and_biases import WandbLogger
from grpo.tools.replay import Replay
from grpo.types import Group, Rollout, StepMetrics, Task, Trajectory


def group(name: str, reward: float, lag: int) -> Group:
    trajectory = Trajectory.sampled((4, 2), (-1.0, -1.0), name, "stop")
    rollout = Rollout(trajectory, {"r": reward}, reward=reward, lag=lag, replayed=lag > 0)
    return Group(Task(0, f"ask {name}", (1,), {}), (rollout, replace(rollout, reward=0.0)))


STEP = StepMetrics(3, {"reward": 0.25, "reuse/groups": 1.0}, (group("fresh", 0.5, 0), group("older", 1.0, 2)))


def test_the_best_completion_is_one_that_the_step_sampled() -> None:
    _, rollout = best_of(STEP)
    assert rollout.trajectory.text == "fresh"


def test_wandb_and_tensorboard_get_what_was_sampled(tmp_path: Path) -> None:
    logger = WandbLogger.__new__(WandbLogger)
    logger._cfg = SimpleNamespace(completions=9)
    sent = logger._of_completions(STEP)
    assert [row[2] for row in sent["completions"].data] == ["fresh", "fresh"]
    assert sum(sent["histograms/reward"].histogram) == sum(sent["histograms/completion_length"].histogram) == 2
    board, histograms = TensorboardLogger(tmp_path, texts=False), []
    board._writer = SimpleNamespace(
        add_scalar=lambda *_: None, add_histogram=lambda name, values, step: histograms.append(list(values))
    )
    board.log(STEP)
    assert histograms == [[2, 2], [0.5, 0.0]]


def test_a_step_made_again_says_which_groups_it_replayed() -> None:
    text = io.StringIO()
    ratios = [[1.0, 1.0]] * 4
    print_replay(Console(file=text, width=200), Replay(STEP, ratios, [["a", "b"]] * 4, []), 9, 1)
    assert [line for line in text.getvalue().splitlines() if line.startswith("ask")] == [
        "ask fresh",
        "ask older (replayed, sampled 2 steps earlier)",
    ]


@pytest.fixture
def recorded(recipe, run_cli) -> Path:
    assert run_cli("train", recipe, "output_dir=one").code == 0
    folder = Path("one")
    store_completions(folder / "completions", 2, STEP.groups, CompletionsConfig(), 0, 2)
    line = '{"step": 2, "reward": 0.25, "reuse/groups": 3.0}\n'
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0] + line)
    return folder


def test_the_report_counts_them_and_shows_them_where_they_were_sampled(recorded: Path) -> None:
    data = data_in(report([read_run(recorded)]))
    (run,) = data["runs"]
    assert ", 3 older groups replayed" in dict(run["settings"])["steps"]
    assert run["cards"]["replayed"] == 3
    prompts = {row["prompt"][-1][-1] for row in rows_in(data)}
    assert "ask fresh" in prompts
    assert "ask older" not in prompts
    assert run["completions"]["total"] == len(rows_in(data))
