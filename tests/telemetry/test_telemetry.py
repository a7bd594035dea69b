"""Who is told what: files, the terminal, W&B."""

import io
import json
import sys
from contextlib import ExitStack
from types import SimpleNamespace

from rich.console import Console

from grpo.config import WandbConfig
from grpo.plugins import find_recipe
from grpo.recipe import load_recipe
from grpo.telemetry.console import ConsoleLogger, before_and_after
from grpo.telemetry.jsonl import JsonlLogger
from grpo.telemetry.loggers import open_loggers
from grpo.telemetry.weights_and_biases import WandbLogger
from grpo.types import EvalMetrics, StepMetrics

VALUES = {
    "reward": 0.5,
    "kl": 0.01,
    "completions/mean_length": 20.0,
    "rollout_tokens_per_second": 1234.0,
    "step_time": 2.0,
}
STEP = StepMetrics(1, VALUES)
EVAL = EvalMetrics(
    0,
    8,
    "right",
    {"greedy": 0.25, "avg@4": 0.5, "pass@4": 1.0},
    {"greedy": (0.0, 0.5), "avg@4": (0.3, 0.7), "pass@4": (1.0, 1.0)},
)


def printed(**settings) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200, **settings), text


def test_files_hold_one_object_a_line(tmp_path) -> None:
    logger = JsonlLogger(tmp_path)
    for record in (EVAL, STEP, StepMetrics(2, VALUES)):
        logger.log(record)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [{"step": 1, **VALUES}, {"step": 2, **VALUES}]
    (line,) = (tmp_path / "eval.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 0, "n": 8, "greedy": 0.25, "avg@4": 0.5, "pass@4": 1.0,
        "greedy_interval": [0.0, 0.5], "avg@4_interval": [0.3, 0.7], "pass@4_interval": [1.0, 1.0],
    }  # fmt: skip


def test_plain_lines_where_there_is_no_terminal() -> None:
    console, text = printed()
    with ConsoleLogger(console, steps=4) as logger:
        logger.log(EVAL)
        logger.log(STEP)
    lines = text.getvalue().splitlines()
    assert lines[0] == "eval at step 0: greedy 25.0%  avg@4 50.0%  pass@4 100.0%  (n=8)"
    assert lines[1].startswith("step 1/4  reward 0.500  kl 0.0100  length 20  1,234 tok/s  0:0")
    assert lines[1].endswith(" left")


def test_a_progress_line_in_a_terminal() -> None:
    console, text = printed(force_terminal=True)
    with ConsoleLogger(console, steps=4) as logger:
        logger.log(STEP)
    assert "1/4" in text.getvalue()
    assert "reward 0.500  kl 0.0100  length 20  1,234 tok/s" in text.getvalue()


def test_before_and_after() -> None:
    console, text = printed()
    console.print(before_and_after(EVAL, EvalMetrics(9, 8, "right", dict.fromkeys(EVAL.values, 1.0), EVAL.intervals)))
    assert "after step 9" in text.getvalue()
    assert "25.0%  (0.0% to 50.0%)" in text.getvalue()


def test_wandb_gets_trl_names(monkeypatch, tmp_path) -> None:
    logged, started = [], {}
    run = SimpleNamespace(log=logged.append, finish=lambda: logged.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: started.update(kwargs) or run))
    recipe = load_recipe(find_recipe("quickstart"), ["log.wandb.project=mine"])
    console, _ = printed()
    with ExitStack() as stack:
        log = open_loggers(stack, recipe, tmp_path, console)
        log(STEP)
        log(EVAL)
    assert started["project"] == "mine"
    assert started["config"]["loss"]["beta"] == recipe.loss.beta
    assert logged[0]["train/reward"] == 0.5
    assert logged[0]["train/global_step"] == 1
    assert logged[1] == {"eval/greedy": 0.25, "eval/avg@4": 0.5, "eval/pass@4": 1.0, "train/global_step": 0}
    assert logged[2] == "finished"


def test_wandb_that_fails_is_said_once_and_left_out(monkeypatch, tmp_path, capsys) -> None:
    def refuse(**_):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    logger = WandbLogger(WandbConfig(), load_recipe(find_recipe("quickstart")), tmp_path)
    logger.log(STEP)
    logger.close()
    assert capsys.readouterr().err.splitlines() == ["W&B is left out from here on: ConnectionError: no route"]
