"""The students: each is made the same again, starts low, and gets better by a few steps of GRPO."""

import json
import sys
from pathlib import Path

import pytest

from grpo.builtin import models
from grpo.builtin.student import Student, make
from grpo.builtin.tasks import TASKS
from grpo.model.mlxlm import new_model
from grpo.plugins import bundled


def made(settings: Student, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    make(settings, folder, new_model)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.quick_cases("builtin:arithmetic", "builtin:guess")
@pytest.mark.parametrize("task", TASKS)
def test_a_student_is_of_its_task_and_made_the_same_again(task: str, tmp_path: Path) -> None:
    first = made(Student(task=task, steps=2, warmup=1), tmp_path / "a")
    assert first == made(Student(task=task, steps=2, warmup=1), tmp_path / "b")
    other = made(Student(task=next(name for name in TASKS if name != task), steps=2, warmup=1), tmp_path / "c")
    assert first["tokenizer.json"] != other["tokenizer.json"]


def test_two_processes_that_make_one_at_once_share_the_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path))
    before = set(tmp_path.iterdir())

    def make_while_another_does(_: Student, made: Path, new_model) -> None:
        (made / "config.json").write_text("mine")
        theirs = final()
        theirs.mkdir()
        (theirs / "config.json").write_text("theirs")

    def final() -> Path:
        digest = models.hashlib.sha256(repr((models.VERSION, models.asdict(Student()))).encode()).hexdigest()[:12]
        return tmp_path / f"arithmetic-student-{digest}"

    monkeypatch.setattr(models, "make", make_while_another_does)
    folder = models.folder("builtin:arithmetic-student", new_model)
    assert (folder / "config.json").read_text() == "theirs"
    assert set(tmp_path.iterdir()) - before == {folder}  # and nothing is left aside


@pytest.mark.slow
@pytest.mark.parametrize("name", models.NAMES)
def test_a_whole_student_is_made_the_same_again(name: str, cache: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(cache))
    kept = {path.name: path.read_bytes() for path in models.folder(name, new_model).iterdir()}
    assert made(models.MODELS[name], tmp_path / "again") == kept


def evaluations(run_cli, cache: Path, into: Path, monkeypatch, task: str, *settings: str) -> tuple[dict, dict]:
    """What a task's recipe measures before its first step and after its last."""
    monkeypatch.setenv("GRPO_CACHE", str(cache))
    recipe = bundled("recipes") / "learning" / f"{task}.yaml"
    ran = run_cli("train", recipe, f"output_dir={into}", "eval.every=40", *settings)
    assert ran.code == 0, ran.err
    before, after = [json.loads(line) for line in (into / "eval.jsonl").read_text().splitlines()]
    return before, after


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="measured for the CPU")
@pytest.mark.parametrize("task", ["countdown", "sorting", "format"])
def test_a_student_starts_low_and_learns(run_cli, cache: Path, tmp_path: Path, monkeypatch, task: str) -> None:
    before, after = evaluations(run_cli, cache, tmp_path / "run", monkeypatch, task)
    assert 0.1 < before["avg@4"] < 0.5
    assert after["avg@4"] > before["avg@4"] + 0.2
    assert after["greedy"] > before["greedy"] + 0.2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="measured for the CPU")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", ["guess", "shop", "walk"])
def test_a_student_learns_to_converse(run_cli, cache: Path, tmp_path: Path, monkeypatch, task: str, seed: int) -> None:
    before, after = evaluations(run_cli, cache, tmp_path / "run", monkeypatch, task, f"seed={seed}")
    assert 0.1 < before["avg@4"] < 0.6
    assert after["avg@4"] > before["avg@4"] + 0.25
    assert after["greedy"] > before["greedy"] + 0.25
