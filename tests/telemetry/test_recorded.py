"""Runs listed, followed, and a step of one made again."""

import io
import json
import shutil
import signal
from pathlib import Path

import pytest
from rich.console import Console
from runs.driver import run

from grpo.recipes import load_recipe
from grpo.runs.folder import recipe_text
from grpo.runs.signals import Stopped
from grpo.telemetry import recorded as module
from grpo.telemetry.console import ConsoleLogger
from grpo.telemetry.jsonl import JsonlLogger
from grpo.telemetry.progress import NowFile
from grpo.telemetry.recorded import find_runs, follow, read_run
from grpo.tools.replay import replay
from grpo.types import StepMetrics


@pytest.fixture
def toy(recipe, run_cli) -> Path:
    recipe.write_text(recipe.read_text() + "eval: {split: train, every: 2, prompts: 2, samples: 2}\n")
    ran = run_cli("train", recipe, "optim.steps=5", "checkpoint.every=3", "optim.num_minibatches=2")
    assert ran.code == 0, ran.err
    return Path("runs/toy")


def test_runs_are_listed_with_what_became_of_them(toy, recipe, run_cli, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert run_cli("train", recipe, "output_dir=runs/short", "optim.steps=1").code == 0
    (toy / "metrics.jsonl").write_text("".join((toy / "metrics.jsonl").read_text().splitlines(keepends=True)[:4]))
    listed = run_cli("runs").out
    assert listed.index("runs/toy") < listed.index("runs/short")  # written to last
    reward = json.loads((toy / "metrics.jsonl").read_text().splitlines()[-1])["reward"]
    for said in ("died 4/5", f"{reward:.3f}", "finished 1/1", "avg@2"):
        assert said in " ".join(listed.split())
    monkeypatch.setattr(module, "is_running", lambda folder: folder.name == "toy")
    assert [found.state for found in find_runs(Path("runs"))] == ["running", "finished"]
    Path("bare").mkdir()
    assert run_cli("runs", "bare").out == "no runs in bare\n"
    absent = run_cli("runs", "absent")
    assert (absent.code, len(absent.err.splitlines())) == (2, 1)
    assert "absent: there is no such folder" in absent.err
    assert "absent: there is no such folder" in run_cli("runs", "--follow", "absent").err


def test_how_a_run_ended_is_told_apart(recipe) -> None:
    def failing(trainer, stop) -> None:
        step = trainer.step
        trainer.step = lambda n: step(n) if n == 1 else Path("absent").read_text()

    def stopping(trainer, stop) -> None:
        step = trainer.step

        def asked(n: int) -> StepMetrics:
            if n == 2:
                stop.signal = signal.SIGTERM
                raise Stopped
            return step(n)

        trainer.step = asked

    with pytest.raises(OSError, match="absent"):
        run(recipe, "output_dir=runs/failed", change=failing)
    run(recipe, "output_dir=runs/stopped", change=stopping)
    run(recipe, "output_dir=runs/finished")
    shutil.copytree("runs/failed", "runs/died")
    Path("runs/died/.ended").unlink()
    assert {found.folder.name: found.state for found in find_runs(Path("runs"))} == {
        word: word for word in ("failed", "stopped", "finished", "died")
    }
    run(recipe, "output_dir=runs/failed", resume=True)
    assert read_run(Path("runs/failed")).state == "finished"


def test_a_folder_with_runs_in_every_state_is_listed(toy, recipe, run_cli, monkeypatch, caplog) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    copies = {name: Path("runs") / name for name in ("older", "torn", "changed", "bare")}
    for copy in copies.values():
        shutil.copytree(toy, copy)
    text = (toy / "recipe.yaml").read_text()
    (copies["older"] / "recipe.yaml").write_text(text + "forgotten: 1\n")
    (copies["torn"] / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n')
    (copies["changed"] / "recipe.yaml").write_text(text.replace("samples: 2", "samples: 3"))
    (copies["bare"] / "metrics.jsonl").unlink()
    (copies["bare"] / "eval.jsonl").unlink()
    shutil.copytree(toy, toy / ".former")  # a run that is being replaced
    listed = run_cli("runs")
    assert listed.code == 0, listed.err
    lines = {line.split()[0]: line.split()[1:] for line in listed.out.splitlines()[1:]}
    assert set(lines) == {"runs/toy", "runs/changed", "runs/bare"}
    assert lines["runs/bare"][:2] == ["died", "0/5"]
    assert "avg@3" not in listed.out
    assert ["skipped runs/older: " in caplog.text, "skipped runs/torn: " in caplog.text] == [True, True]
    for args in (["report", "runs/torn"], ["runs", "--follow", "runs/torn"]):
        refused = run_cli(*args)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("metrics.jsonl", '{"step": null}'),
        ("metrics.jsonl", '{"step": true}'),
        ("metrics.jsonl", '{"step": "1"}'),
        ("metrics.jsonl", '{"step": 1, "reward": "high"}'),
        ("metrics.jsonl", "[1]"),
        ("metrics.jsonl", "{}"),
        ("metrics.jsonl", "\udcff"),
        ("metrics.jsonl", "[" * 100_000),
        ("eval.jsonl", '{"step": 1}'),
        ("eval.jsonl", '{"step": 1, "n": 2, "grader": "r", "greedy": 1.0, "greedy_interval": [1.0]}'),
    ],
)
def test_a_line_that_is_no_record_breaks_its_own_run_only(recipe, caplog, file: str, line: str) -> None:
    for name in ("sound", "odd"):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(recipe_text(load_recipe(recipe)))
        (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    with Path("runs/odd", file).open("a", errors="surrogateescape") as log:
        log.write(f"{line}\n")
    assert [(found.folder.name, found.step) for found in find_runs(Path("runs"))] == [("sound", 1)]
    number = 2 if file == "metrics.jsonl" else 1
    assert f"skipped runs/odd: runs/odd/{file}:{number}: not a record that grpo wrote" in caplog.text


def test_a_run_is_followed_until_it_ends(toy, monkeypatch) -> None:
    everything = (toy / "metrics.jsonl").read_text()
    (toy / "metrics.jsonl").write_text("".join(everything.splitlines(keepends=True)[:2]))
    going_on = iter([True, True, False])
    monkeypatch.setattr(module, "is_running", lambda folder: next(going_on, False))
    text, logger = io.StringIO(), JsonlLogger(toy)

    def wait() -> None:
        line = json.loads(everything.splitlines()[2])
        if "step 3/5" not in text.getvalue():
            logger.log(StepMetrics(line.pop("step"), line))

    follow(toy, Console(file=text, width=200), wait)
    shown = [line.split("  ")[0] for line in text.getvalue().splitlines()]
    assert [line for line in shown if line.startswith("step")] == ["step 1/5", "step 2/5", "step 3/5"]
    assert [line[:14] for line in shown if line.startswith("eval")] == [f"eval at step {n}:"[:14] for n in (0, 2, 4, 5)]
    assert shown[-1] == "died after step 3"


def test_who_follows_sees_the_phase_that_a_run_is_in(toy, monkeypatch) -> None:
    going_on, now, told = iter([True, True, False]), NowFile(toy), []
    monkeypatch.setattr(module, "is_running", lambda folder: next(going_on, False))
    monkeypatch.setattr(ConsoleLogger, "progress", lambda self, *now: told.append(now))
    follow(toy, Console(file=io.StringIO()), lambda: now.progress("evaluation", 5_000, 1_000_000))
    now.close()
    assert told == [("evaluation", 5_000, 1_000_000, None)] * 2


@pytest.mark.quick_cases("5-step-000003")
@pytest.mark.parametrize(("step", "source"), [(1, "from the start"), (5, "step-000003")])
def test_a_step_is_made_again_as_it_was(toy, step: int, source: str) -> None:
    made = replay(toy, step)
    assert source in made.notes[0]
    assert made.notes[-1] == "its completions are those that the run stored"
    line = json.loads((toy / "metrics.jsonl").read_text().splitlines()[step - 1])
    for name in ("reward", "loss", "grad_norm", "entropy", "adapter_delta"):
        assert made.metrics.values[name] == line[name]
    rollouts = [rollout for group in made.metrics.groups for rollout in group.rollouts]
    lengths = [len(rollout.trajectory.token_ids) for rollout in rollouts]
    assert [len(ratios) for ratios in made.ratios] == [len(texts) for texts in made.tokens] == lengths
    # What the update did: tokens of better completions became likelier.
    up = [ratio for r, ratios in zip(rollouts, made.ratios, strict=True) if r.advantage > 0 for ratio in ratios]
    down = [ratio for r, ratios in zip(rollouts, made.ratios, strict=True) if r.advantage < 0 for ratio in ratios]
    assert sum(up) / len(up) > 1 > sum(down) / len(down)


def test_a_replay_is_shown_and_says_where_it_is_not_the_run(toy, run_cli, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    before = {path: path.stat().st_mtime_ns for path in toy.rglob("*")}
    ran = run_cli("replay", toy, "--step", 4, "--groups", 1, "--tokens", 3)
    assert ran.code == 0, ran.err
    for said in (
        "repeated from",
        "step 4  reward",
        "What is",
        "advantage",
        "ratios of the 3 tokens",
        "1 more prompts",
    ):
        assert said in ran.out
    assert {path: path.stat().st_mtime_ns for path in toy.rglob("*")} == before
    lines = (toy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (toy / "metrics.jsonl").write_text("".join(lines[:3]))
    assert "this run has done 3 of its 5 steps" in run_cli("replay", toy, "--step", 5).err
    (toy / "metrics.jsonl").write_text("".join(lines))
    Path("digits.py").write_text("def reward(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    changed = run_cli("replay", toy, "--step", 5)
    assert "changed since then: code of" in changed.out
    assert "NOT those of the run" in changed.out
    for args, said in ((["--step", 6], "this run has 5 steps"), (["--step", 0], "")):
        refused = run_cli("replay", toy, *args)
        assert refused.code == 2
        assert said in refused.err
