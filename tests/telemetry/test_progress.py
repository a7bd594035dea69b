"""How far a phase is: counted in tokens, told now and then, and never at the cost of the step."""

from __future__ import annotations

import io
from contextlib import ExitStack

import mlx.core as mx
import pytest
from rich.console import Console

from grpo.generation import progress
from grpo.generation.generator import Request
from grpo.generation.sampling import Sampling
from grpo.progress import RowCounts
from grpo.recipes import load_recipe
from grpo.runs.folder import NOW
from grpo.runs.prepare import prepare
from grpo.telemetry import progress as files
from grpo.telemetry.console import ConsoleLogger, print_parts, print_wrapped
from grpo.telemetry.loggers import open_loggers
from grpo.telemetry.progress import NowFile, Phase, read_now
from grpo.types import EvalMetrics, StepMetrics

VALUES = {"reward": 0.5, "completions/mean_length": 20.0, "rollout_tokens_per_second": 1234.0, "step_time": 2.0}


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def printed(width: int = 200, **settings) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=width, **settings), text


def test_a_phase_tells_tokens_and_speed_since_it_was_first_heard_of() -> None:
    phase = Phase("rollout", 64, 10.0)
    assert phase.report(64, 1024, 10.0) == ["64 of at most 1,024 tokens"]
    assert phase.report(564, 1000, 15.0) == ["564 of at most 1,000 tokens", "100 tok/s"]
    assert phase.goes_on("rollout", 564)
    assert not phase.goes_on("rollout", 100)  # the next one, though more than the first word of this one
    assert not phase.goes_on("evaluation", 600)
    assert phase.report(900, 900, 20.0) == ["900 tokens", "84 tok/s"]
    assert phase.report(910, 4000, 20.0, RowCounts(37, 64, 64)) == ["910 tokens", "37 of 64 rows", "85 tok/s"]
    assert phase.report(920, 4000, 20.0, RowCounts(37, 64, 136))[1:] == ["37 of 64 rows", "2.1 turns a row", "86 tok/s"]
    assert Phase("update", 0, 0.0).report(1, 8, 9.0) == ["1 of 8 micro-batches"]
    assert Phase("reward", 0, 0.0).report(0, 64, 9.0) == ["0 of 64 completions"]


def test_a_log_file_gets_a_line_on_a_phase_that_takes_long() -> None:
    (console, text), clock = printed(), Clock()
    with ConsoleLogger(console, 4, clock) as logger:
        for second in range(0, 65, 5):
            clock.now = 100.0 + second
            logger.progress("evaluation", 10 * (1 + second), 4096)
        logger.log(StepMetrics(1, VALUES))
        for second in (60, 89, 93, 95):  # 30 seconds after the step's line, not before
            clock.now = 100.0 + second
            logger.progress("rollout", 50 * (second - 59), 4096)
        logger.progress("reward", 0, 64)
    assert [line for line in text.getvalue().splitlines() if not line.startswith("step")] == [
        "evaluation: 310 of at most 4,096 tokens  10 tok/s",
        "evaluation: 610 of at most 4,096 tokens  10 tok/s",
        "rollout: 1,700 of at most 4,096 tokens  50 tok/s",
    ]


def test_a_terminal_shows_the_phase_by_its_name_in_eighty_columns() -> None:
    (console, text), clock = printed(80, force_terminal=True), Clock()
    with ConsoleLogger(console, 500, clock) as logger:
        logger.log(StepMetrics(3, VALUES | {"kl": 0.0355}))
        logger.progress("evaluation", 0, 2_097_152)
        clock.now += 100
        logger.progress("evaluation", 1_234_500, 2_000_000)
        shown = [line.rstrip() for line in _rendered(logger)]
        logger.progress("reward", 0, 8)
        assert "tokens" not in "".join(_rendered(logger))
    assert len(_rendered(logger)) == 2
    assert "evaluation: " not in text.getvalue()  # such lines are for log files
    assert shown[0].startswith("step       3/500 reward 0.500  kl 0.0355  length 20  1,234 tok/s")
    assert shown[1].startswith("evaluation       1,234,500 of at most 2,000,000 tokens  12,345 tok/s")
    assert not any("…" in line for line in shown)


def test_a_narrow_terminal_leaves_out_the_least_important() -> None:
    for width, shown in (
        (40, ["step 3/500 reward 0.500 16:23", "rollout 860 tokens", "reward ▁█ 0.250 to 0.500"]),
        (60, ["step 3/500 reward 0.500 kl 0.0355 16:23", "rollout 860 tokens 37 of 64 rows"]),
        (120, ["left", "86 tok/s"]),
    ):
        (console, _), clock = printed(width, force_terminal=True), Clock()
        with ConsoleLogger(console, 500, clock) as logger:
            logger.log(StepMetrics(2, VALUES | {"reward": 0.25}))
            clock.now += 2
            logger.log(StepMetrics(3, VALUES | {"kl": 0.0355}))
            clock.now += 1
            logger.progress("rollout", 0, 4000, RowCounts(0, 64, 0))
            clock.now += 10
            logger.progress("rollout", 860, 4000, RowCounts(37, 64, 136))
            lines = _rendered(logger, width)
        assert all(len(line) <= width for line in lines)
        assert not any("…" in line for line in lines)
        for part in shown:
            assert any(part in " ".join(line.split()) for line in lines), (part, lines)


def test_the_time_left_goes_by_the_last_steps_and_runs_down() -> None:
    """As of a resumed run: steps of two seconds, then one that took 42 with its evaluation."""
    (console, text), clock = printed(), Clock()
    logger = ConsoleLogger(console, 4000, clock)
    logger.log(StepMetrics(3901, VALUES))
    for step in range(3902, 3921):
        clock.now += 2
        logger.log(StepMetrics(step, VALUES))
    clock.now += 42
    logger.log(StepMetrics(3921, VALUES))
    said = [line.rsplit("  ", 1)[1] for line in text.getvalue().splitlines()]
    assert said[:2] == ["3:18 left", "3:16 left"]
    assert said[-1] == "5:16 left"  # 79 steps, at 80 seconds for the last 20
    logger = ConsoleLogger(printed(120, force_terminal=True)[0], 4000, clock)
    logger.log(StepMetrics(1, VALUES))
    assert "2:13:18 left" in _rendered(logger, 120)[0]
    clock.now += 60
    assert "2:12:18 left" in _rendered(logger, 120)[0]


def test_the_time_left_of_a_run_that_is_followed_late() -> None:
    """Its steps come all at once, and the next one soon after."""
    (console, text), clock = printed(), Clock()
    logger = ConsoleLogger(console, 100, clock)
    for step in range(1, 41):
        logger.log(StepMetrics(step, VALUES))
    clock.now += 0.5
    logger.log(StepMetrics(41, VALUES))
    said = [line.rsplit("  ", 1)[1] for line in text.getvalue().splitlines()]
    assert said[-2:] == ["2:00 left", "1:58 left"]


def _rendered(logger: ConsoleLogger, width: int = 80) -> list[str]:
    (console, text) = printed(width, no_color=True)
    for part in logger._progress.get_renderables():
        console.print(part)
    return text.getvalue().splitlines()


def test_lines_break_between_parts_on_a_narrow_terminal_and_nowhere_in_a_file() -> None:
    record = EvalMetrics(0, 256, "right", {f"pass@{2**k}": 0.914 for k in range(8)} | {"greedy": 0.3}, {})
    for settings, lines in (({"force_terminal": True}, 3), ({}, 1)):
        console, text = printed(80, **settings)
        logger = ConsoleLogger(console, 4)
        logger.log(record)
        said = text.getvalue().splitlines()
        assert len(said) == lines
        assert " ".join(" ".join(said).split()).count("pass@8 91.4%") == 1
        assert all(line == line.rstrip() and (lines == 1 or len(line) <= 80) for line in said)
        assert not any(line.startswith("  9") for line in said)
    console, text = printed(20, force_terminal=True)
    print_parts(console, ["one"])
    print_wrapped(console, "memory about 10 MB: the largest of rollout 1 MB")
    assert text.getvalue().splitlines() == ["one", "memory about 10 MB:", "  the largest of", "  rollout 1 MB"]


def test_tokens_are_counted_to_the_end_and_the_bound_falls(make_policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELL_EVERY", 0.0)
    toy, told = make_policy(slots=2), []
    toy.generator.progress = lambda *now: told.append(now)
    prompt = toy.tokenizer.encode("What is 3+4?")
    groups = toy.generator.generate([Request(prompt, 3)], Sampling(max_tokens=12), mx.random.key(0), phase="evaluation")
    made = sum(len(completion.token_ids) for group in groups for completion in group)
    assert {phase for phase, *_ in told} == {"evaluation"}
    assert told[-1][1:] == (made, made, (3, 3, 3))
    assert [done for _, done, *_ in told] == sorted(done for _, done, *_ in told)
    assert [total for _, _, total, _ in told] == sorted((total for _, _, total, _ in told), reverse=True)
    assert {rows.ended for *_, rows in told} >= {0, 3}
    assert told[0][2] <= 3 * 12
    assert len(told) > 12


def test_between_two_reports_nothing_is_counted(make_policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELL_EVERY", 1e9)
    toy, told = make_policy(), []
    toy.generator.progress = lambda *now: told.append(now)
    prompt = toy.tokenizer.encode("What is 3+4?")
    monkeypatch.setattr(progress.time, "monotonic", lambda: 2e9)
    toy.generator.generate([Request(prompt, 4)], Sampling(max_tokens=12), mx.random.key(0))
    assert len(told) == 2  # the first tokens, and the end


def test_every_phase_of_a_run_goes_by_its_name(recipe, tmp_path) -> None:
    held = ["eval={source: train.jsonl, split: train, prompts: 2, samples: 2}"]
    prepared, told = prepare(load_recipe(recipe, ["rewards.0.isolation=inline", *held])), []
    trainer = prepared.trainer
    watched = (trainer.engine.generator, trainer.scorer, trainer.update)
    with ExitStack() as stack:
        stack.callback(trainer.scorer.close)
        open_loggers(stack, trainer.cfg, tmp_path, printed()[0], "id", watched)
        show = watched[0].progress
        for one in watched:
            one.progress = lambda *now: told.append(now) or show(*now)
        prepared.evaluator(0)
        trainer.step(1)
        assert read_now(tmp_path)[0] == "update"
    assert not (tmp_path / NOW).exists()
    names = [name for name, *_ in told]
    assert list(dict.fromkeys(names)) == ["evaluation", "reward", "rollout", "update"]
    assert ("reward", 0, 8) in told
    updates = [now for now in told if now[0] == "update"]
    assert updates[0][1] == 0
    assert updates[-1][1] == updates[-1][2]


def test_a_terminal_that_is_gone_does_not_end_a_step(recipe, tmp_path, monkeypatch, caplog) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError("Broken pipe")

    class Watched:
        progress = None

    monkeypatch.setattr(ConsoleLogger, "progress", gone)
    with ExitStack() as stack:
        open_loggers(stack, load_recipe(recipe), tmp_path, printed()[0], "id", [Watched])
        for done in (1, 2):
            Watched.progress("rollout", done, 2)
    assert (
        caplog.text.count("progress on the terminal failed and is disabled for the rest of the run: BrokenPipeError")
        == 1
    )


def test_the_phase_is_in_the_folder_for_those_who_follow(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = NowFile(tmp_path)
    assert read_now(tmp_path) is None
    monkeypatch.setattr(files, "WRITE_EVERY", 1e9)
    now.progress("rollout", 5, 10, RowCounts(1, 2, 3))
    now.progress("rollout", 6, 10)  # not yet
    assert read_now(tmp_path) == ("rollout", 5, 10, RowCounts(1, 2, 3))
    now.progress("reward", 0, 8)
    assert read_now(tmp_path) == ("reward", 0, 8, None)
    for torn in ("", "[1", "{}", '["a", 1]', '["a", 1, 2, [3]]'):
        (tmp_path / NOW).write_text(torn)
        assert read_now(tmp_path) is None
    now.close()
    assert not (tmp_path / NOW).exists()
    gone = NowFile(tmp_path / "gone")
    gone.progress("rollout", 1, 2)
    gone.close()
