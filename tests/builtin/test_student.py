"""The students: each is made the same again, starts low, and gets better by a few steps of GRPO."""

import json
import sys
from pathlib import Path

import pytest

from grpo.builtin import models
from grpo.builtin.student import Student, make
from grpo.builtin.tasks import TASKS
from grpo.plugins import bundled


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    """Keeps the made students from one run of the tests to the next."""
    return request.config.cache.mkdir("grpo")


def made(settings: Student, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    make(settings, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("task", TASKS)
def test_a_student_is_of_its_task_and_made_the_same_again(task: str, tmp_path: Path) -> None:
    first = made(Student(task=task, steps=2, warmup=1), tmp_path / "a")
    assert first == made(Student(task=task, steps=2, warmup=1), tmp_path / "b")
    other = made(Student(task=next(name for name in TASKS if name != task), steps=2, warmup=1), tmp_path / "c")
    assert first["tokenizer.json"] != other["tokenizer.json"]


@pytest.mark.slow
@pytest.mark.parametrize("name", models.NAMES)
def test_a_whole_student_is_made_the_same_again(name: str, cache: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(cache))
    kept = {path.name: path.read_bytes() for path in models.folder(name).iterdir()}
    assert made(models.MODELS[name], tmp_path / "again") == kept


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="measured for the CPU")
@pytest.mark.parametrize("task", ["countdown", "sorting", "format"])
def test_a_student_starts_low_and_learns(run_cli, cache: Path, tmp_path: Path, monkeypatch, task: str) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(cache))
    recipe = bundled("recipes") / "learning" / f"{task}.yaml"
    ran = run_cli("train", recipe, f"output_dir={tmp_path / 'run'}", "eval.every=40")
    assert ran.code == 0, ran.err
    before, after = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    assert 0.1 < before["avg@4"] < 0.5
    assert after["avg@4"] > before["avg@4"] + 0.2
    assert after["greedy"] > before["greedy"] + 0.2
