"""The copy of a teacher's adapter that a run keeps: the run goes on without the folder that was named."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from runs.test_taught_runs import with_adapter

from grpo.runs.checkpoint import checkpoints

WEIGHTS = "adapters.safetensors"
TAUGHT = ("rewards=[{use: exact_match, weight: 0}]", "teacher={adapter: teacher, kl: exact}", "checkpoint.every=1")


@pytest.fixture
def run(recipe: Path, run_cli) -> Path:
    """A finished run of two steps, whose teacher is the folder `teacher`."""
    with_adapter(recipe)
    ended = run_cli("train", recipe, "output_dir=run", *TAUGHT)
    assert ended.code == 0, ended.err
    return Path("run")


def last(run: Path) -> Path:
    return checkpoints(run / "checkpoints")[-1]


def test_a_run_goes_on_without_the_folder_of_its_teacher(recipe: Path, run: Path, run_cli) -> None:
    """By its own recipe and by the one that it was begun with; it is replayed and evaluated, too."""
    kept = run / "teacher_adapter" / WEIGHTS
    assert kept.read_bytes() == Path("teacher", WEIGHTS).read_bytes()
    whole = (last(run) / WEIGHTS).read_bytes()
    shutil.rmtree("teacher")
    for command in (
        ["train", run / "recipe.yaml", "output_dir=run", "--resume"],
        ["train", recipe, "output_dir=run", *TAUGHT, "--resume"],
        ["replay", run, "--step", "2"],
    ):
        if command[0] == "train":
            shutil.rmtree(last(run))
        ran = run_cli(*command)
        assert ran.code == 0, (command, ran.err)
        assert (last(run) / WEIGHTS).read_bytes() == whole
        assert kept.is_file()


def test_another_teacher_in_its_place_is_taken_by_leave_alone(recipe: Path, run: Path, run_cli) -> None:
    weights = mx.load(str(Path("teacher", WEIGHTS)))
    mx.eval(weights)
    mx.save_safetensors(str(Path("teacher", WEIGHTS)), {path: 2 * array for path, array in weights.items()})
    shutil.rmtree(last(run))
    again = ["train", recipe, "output_dir=run", *TAUGHT]
    refused = run_cli(*again, "--resume")
    assert refused.code != 0
    assert "contents of teacher.adapter" in refused.err
    kept = run / "teacher_adapter" / WEIGHTS
    assert kept.read_bytes() != Path("teacher", WEIGHTS).read_bytes()
    taken = run_cli(*again, "--resume-changed")
    assert taken.code == 0, taken.err
    assert kept.read_bytes() == Path("teacher", WEIGHTS).read_bytes()


@pytest.mark.slow
def test_an_evaluation_needs_no_teacher(recipe: Path, run: Path, run_cli) -> None:
    """Neither of a run, nor with an adapter of another shape than the teacher's, nor of a recipe."""
    shutil.rmtree("teacher")
    shutil.rmtree(run / "teacher_adapter")
    held_out = ["--data", "train.jsonl", "--prompts", "2", "--samples", "1"]
    ran = run_cli("eval", run, *held_out)
    assert ran.code == 0, ran.err
    ran = run_cli("eval", recipe, *TAUGHT, *held_out)
    assert ran.code == 0, ran.err
    missing = run_cli("train", run / "recipe.yaml", "output_dir=other")
    assert missing.code != 0
    assert "teacher.adapter" in missing.err
