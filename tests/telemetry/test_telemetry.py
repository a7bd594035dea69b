"""Who is told what: files, the terminal, W&B."""

import errno
import io
import json
import struct
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from grpo.errors import UserError
from grpo.plugins import find_recipe
from grpo.recipes import load_recipe
from grpo.runs.state import RunState
from grpo.telemetry.console import ConsoleLogger, before_and_after, single, sparkline
from grpo.telemetry.jsonl import JsonlLogger, read_evaluations, read_steps
from grpo.telemetry.loggers import open_loggers
from grpo.training.state import TrainerState
from grpo.types import EvalMetrics, Group, Rollout, StepMetrics, Task, Trajectory

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


GROUPS = (
    Group(
        Task(0, "What is 3+4?", (1,), {}),
        (
            Rollout(Trajectory.sampled((4, 2), None, "8", "stop"), reward=0.0, advantage=-1.0),
            Rollout(Trajectory.sampled((4, 5, 2), None, "it is\n7", "stop"), reward=1.0, advantage=1.0),
        ),
    ),
)


def printed(**settings) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200, **settings), text


def test_what_is_not_finite_is_left_out_of_files(tmp_path) -> None:
    logger = JsonlLogger(tmp_path)
    logger.log(StepMetrics(1, {"reward": 0.5, "kl": float("nan"), "ratio": float("inf")}))
    logger.log(replace(EVAL, values={**EVAL.values, "greedy": float("nan")}))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "reward": 0.5}
    assert read_steps(tmp_path) == [StepMetrics(1, {"reward": 0.5})]
    assert "greedy" not in read_evaluations(tmp_path)[0].values


def test_files_hold_one_object_a_line(tmp_path) -> None:
    logger = JsonlLogger(tmp_path)
    for record in (EVAL, STEP, StepMetrics(2, VALUES)):
        logger.log(record)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [{"step": 1, **VALUES}, {"step": 2, **VALUES}]
    (line,) = (tmp_path / "eval.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 0, "n": 8, "grader": "right", "failed_gradings": 0, "greedy": 0.25, "avg@4": 0.5, "pass@4": 1.0,
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


def test_a_metric_s_long_name_is_told_whole() -> None:
    name = "environment/shopper/calls_of_tools"
    measured = EvalMetrics(0, 8, "right", {name: 12.3456}, {name: (1.5, 20.25)})
    for told, width in ((before_and_after(measured, measured), 72), (single(measured), 48)):
        (console := Console(file=io.StringIO(), width=width)).print(told)
        cells = [line.split("│")[1].strip() for line in console.file.getvalue().splitlines() if "│" in line]
        assert name in "".join(cells)


def test_before_and_after() -> None:
    console, text = printed()
    console.print(before_and_after(EVAL, EvalMetrics(9, 8, "right", dict.fromkeys(EVAL.values, 1.0), EVAL.intervals)))
    assert "after step 9" in text.getvalue()
    assert "25.0%  (0.0% to 50.0%)" in text.getvalue()


def test_gradings_that_failed_are_told(tmp_path) -> None:
    failed = replace(EVAL, failed_gradings=3)
    console, text = printed()
    ConsoleLogger(console, steps=4).log(failed)
    assert text.getvalue().rstrip().endswith("(n=8, 3 gradings failed)")
    console.print(before_and_after(EVAL, failed))
    assert "failed gradings, which count as wrong answers: 0 and 3" in text.getvalue()
    console, text = printed()
    console.print(before_and_after(EVAL, EVAL, "base"))
    assert "failed" not in text.getvalue()
    assert " base " in text.getvalue()
    JsonlLogger(tmp_path).log(failed)
    assert read_evaluations(tmp_path) == [failed]
    line = json.loads((tmp_path / "eval.jsonl").read_text())
    del line["failed_gradings"]  # as older runs have it
    (tmp_path / "eval.jsonl").write_text(json.dumps(line) + "\n")
    assert read_evaluations(tmp_path) == [EVAL]


def test_a_terminal_shows_the_curve_and_a_sample() -> None:
    console, text = printed(force_terminal=True)
    with ConsoleLogger(console, steps=4) as logger:
        for step, reward in enumerate((0.0, 0.5, 1.0), start=1):
            logger.log(StepMetrics(step, VALUES | {"reward": reward}, GROUPS))
    assert "reward ▁▅█  0.000 to 1.000" in text.getvalue()
    assert "length ▁▁▁  20 to 20" in text.getvalue()
    assert "What is 3+4?" in text.getvalue()
    assert " 1.000 it is 7" in text.getvalue()


def test_sparklines() -> None:
    assert [sparkline(values) for values in ([], [3.0], [0, 7, 3.5], [-1, -1])] == ["", "▁", "▁█▅", "▁▁"]


def test_what_is_written_is_read_back(tmp_path) -> None:
    logger = JsonlLogger(tmp_path)
    for record in (EVAL, STEP):
        logger.log(record)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')  # being written
    assert read_steps(tmp_path) == [STEP]
    assert read_evaluations(tmp_path) == [EVAL]
    assert read_steps(tmp_path / "absent") == []


def test_lines_that_cannot_be_written_come_later(tmp_path, caplog) -> None:
    folder = tmp_path / "run"
    logger = JsonlLogger(folder)
    logger.log(STEP)
    logger.log(StepMetrics(2, VALUES))
    assert caplog.text.count("cannot be written: No such file or directory") == 1
    folder.mkdir()
    logger.log(StepMetrics(3, VALUES))
    assert [record.step for record in read_steps(folder)] == [1, 2, 3]


def recipe(tmp_path, *overrides: str):
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    return load_recipe(find_recipe("quickstart"), overrides)


def test_tensorboard_has_every_number(tmp_path) -> None:
    console, _ = printed()
    with ExitStack() as stack:
        log = open_loggers(stack, recipe(tmp_path, "log.tensorboard=true"), tmp_path, console, "id")
        log(StepMetrics(1, VALUES, GROUPS))
        log(replace(EVAL, failed_gradings=3))
    found = {value.tag: (event.step, value.simple_value) for event in events(tmp_path) for value in event.summary.value}
    assert found["train/reward"] == (1, 0.5)
    assert found["eval/pass_4"] == (0, 1.0)  # no @ in TensorBoard's names
    assert found["eval/failed_gradings"] == (0, 3.0)
    assert {f"train/{name}" for name in VALUES} | {"histograms/reward", "histograms/completion_length"} <= set(found)


@pytest.mark.parametrize(("step", "shown"), [(2, [1, 2, 3]), (0, [1, 2, 3])])
def test_tensorboard_shows_a_step_that_came_again_once(tmp_path, step: int, shown: list[int]) -> None:
    cfg, (console, _) = recipe(tmp_path, "log.tensorboard=true"), printed()
    for resumed in (None, RunState("id", TrainerState({}, {}), step=step)):
        with ExitStack() as stack:
            log = open_loggers(stack, cfg, tmp_path, console, "id", resumed=resumed)
            for n in range(1 if resumed is None else step + 1, 4):
                log(StepMetrics(n, VALUES, GROUPS))
    seen: list[int] = []
    for event in events(tmp_path):
        if event.session_log.status == event.session_log.START:  # TensorBoard drops what came before, from its step on
            seen = [n for n in seen if n < event.step]
        seen += [event.step for value in event.summary.value if value.tag == "train/reward"]
    assert seen == shown


def events(folder: Path) -> list:
    """The records of TensorBoard's files in the order of writing: length u64, checksum u32, event, checksum u32."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_a_logger_of_ones_own_is_one_function_and_cannot_end_a_run(tmp_path, caplog) -> None:
    (tmp_path / "mine.py").write_text(
        "seen = []\ndef log(record):\n    seen.append(record.step)\n    assert record.step < 2, 'enough'\n"
    )
    console, _ = printed()
    with ExitStack() as stack:
        log = open_loggers(stack, recipe(tmp_path, f"log.use=['{tmp_path}/mine.py:log']"), tmp_path, console, "id")
        for step in (1, 2, 3):
            log(StepMetrics(step, VALUES))
    assert sys.modules["grpo_plugin_mine"].seen == [1, 2]
    assert caplog.text.count("mine.py:log failed and is disabled for the rest of the run: AssertionError: enough") == 1
    with pytest.raises(UserError, match="logger 'mine"), ExitStack() as stack:
        open_loggers(stack, recipe(tmp_path, "log.use=['mine.py:log']"), tmp_path, console, "id")


def test_a_terminal_that_has_gone_ends_no_run(tmp_path, caplog) -> None:
    class Gone(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    with ExitStack() as stack:
        log = open_loggers(stack, recipe(tmp_path), tmp_path, Console(file=Gone()), "id")
        for step in (1, 2):
            log(StepMetrics(step, VALUES))
    assert [record.step for record in read_steps(tmp_path)] == [1, 2]
    assert caplog.text.count("the terminal failed and is disabled for the rest of the run: OSError") == 1
