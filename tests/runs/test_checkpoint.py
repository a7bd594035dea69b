"""Checkpoints: atomic, checked, and not lost when the disk is."""

import errno
import gc
import importlib.metadata
import os
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from runs.driver import run, same_end, timeless

from grpo import __version__
from grpo.errors import RunError, UserError
from grpo.runs import checkpoint as module
from grpo.runs.checkpoint import (
    SUMS,
    Context,
    checkpoint_path,
    checkpoints,
    damage,
    load_checkpoint,
    newest_whole,
    read_state,
    save_checkpoint,
    step_of,
)
from grpo.runs.folder import find_checkpoint
from grpo.runs.loop import better
from grpo.runs.state import Best, RunState
from grpo.training.state import TrainerState
from grpo.types import EvalMetrics

STATE = RunState(
    "id",
    TrainerState(
        {"adapters": {"a": mx.arange(99.0)}, "optimizer": {"step": mx.array(7, mx.uint64)}}, {"tasks": {"cursor": 3}}
    ),
)
CONTEXT = Context(
    "seed: 0\n", {"digits.py": "0" * 64}, {"fine_tune_type": "lora"}, {"micro_batch_tokens": 256}, {"model a/b": "c"}
)


def save(folder: Path, step: int, keep: int = 3, best: int | None = None) -> Path:
    state = replace(STATE, step=step, best=Best(best, 1.0) if best is not None else None)
    return save_checkpoint(folder, state, CONTEXT, keep)


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in checkpoints(folder)]


def test_what_is_saved_is_loaded(tmp_path) -> None:
    state, context = load_checkpoint(save(tmp_path, 5, best=2))
    assert context == CONTEXT
    assert state.plain() == replace(STATE, step=5, best=Best(2, 1.0)).plain()
    assert mx.array_equal(state.trainer.arrays["adapters"]["a"], mx.arange(99.0))
    assert state.trainer.arrays["optimizer"]["step"].dtype == mx.uint64


def test_grpo_need_not_be_installed(tmp_path, monkeypatch) -> None:
    """On PYTHONPATH it has no metadata."""
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name.startswith("grpo"):
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert read_state(save(tmp_path, 5))["versions"]["grpo-mlx"] == __version__


def test_the_newest_and_the_best_are_kept(tmp_path) -> None:
    for step in (5, 10, 20, 100):
        path = save(tmp_path, step, keep=2, best=5)
    assert path == tmp_path / "step-000100"
    assert {file.name for file in path.iterdir()} == {
        "adapter_config.json",
        "adapters.safetensors",
        "optimizer.safetensors",
        "recipe.yaml",
        "state.json",
        SUMS,
    }
    assert sorted(os.listdir(tmp_path)) == ["step-000005", "step-000020", "step-000100"]
    save(tmp_path, 1_000_000, keep=2, best=20)
    assert steps(tmp_path) == [20, 100, 1_000_000]


def test_an_old_one_that_cannot_be_deleted_is_not_an_error_of_the_new_one(tmp_path, monkeypatch, caplog) -> None:
    """Somebody has made its folder read-only, say, so as to keep it."""
    save(tmp_path, 5, keep=1)
    rmtree = shutil.rmtree

    def refused(path: Path, ignore_errors: bool = False) -> None:
        if path.name == "step-000005":
            raise PermissionError(errno.EACCES, "Permission denied")
        rmtree(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", refused)
    assert damage(save(tmp_path, 10, keep=1)) is None
    assert steps(tmp_path) == [5, 10]
    assert "step-000005 is no longer needed but could not be deleted: Permission denied" in caplog.text


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_checksums_are_those_of_sha256sum(tmp_path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=save(tmp_path, 5), check=True, capture_output=True)


@pytest.mark.parametrize("call", ["save_safetensors", "fsync", "rename"])
def test_one_that_was_not_finished_is_not_one(tmp_path, monkeypatch, call: str) -> None:
    save(tmp_path, 5)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = {"save_safetensors": module.mx, "fsync": module.os, "rename": Path}[call]
    monkeypatch.setattr(owner, call, full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 10)
    assert os.listdir(tmp_path) == ["step-000005"]
    assert damage(tmp_path / "step-000005") is None


def test_one_that_replaces_another_of_its_step_never_leaves_none(tmp_path, monkeypatch) -> None:
    save(tmp_path, 5, keep=1)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            monkeypatch.setattr(module, "restore_replaced", lambda _: None)  # nor is anything done after it
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 5, keep=1, best=5)
    monkeypatch.undo()
    assert checkpoints(tmp_path) == []
    module.restore_replaced(tmp_path)
    assert (steps(tmp_path), damage(tmp_path / "step-000005")) == ([5], None)
    save(tmp_path, 5, keep=1, best=5)
    assert os.listdir(tmp_path) == ["step-000005"]
    assert load_checkpoint(tmp_path / "step-000005")[0].best == Best(5, 1.0)


def test_an_evaluation_that_lacks_the_metric_is_not_the_best() -> None:
    best, without = Best(2, 0.5), EvalMetrics(4, 1, "r", {"greedy": 1.0}, {"greedy": (1.0, 1.0)})
    assert better(best, without, "rewards/r") == best
    assert better(None, without, "rewards/r") is None
    assert better(best, without, "greedy") == Best(4, 1.0)


def test_a_run_goes_on_from_the_newest_whole_one_and_says_what_it_passed_over(recipe, run_cli) -> None:
    recipe.write_text(recipe.read_text().replace("steps: 2", "steps: 3") + "checkpoint: {every: 1}\n")
    run(recipe, "output_dir=whole")
    run(recipe, "output_dir=parts")
    newest = Path("parts/checkpoints/step-000003")
    (newest / "optimizer.safetensors").write_bytes(b"")
    ran = run_cli("train", recipe, "output_dir=parts", "--resume")
    assert ran.code == 0, ran.err
    assert f"skipped {newest}: optimizer.safetensors: changed since it was written" in ran.out
    assert "resumes after step 2 from parts/checkpoints/step-000002" in ran.out
    same_end(Path("whole"), Path("parts"))
    for path in Path("parts/checkpoints").iterdir():
        (path / SUMS).unlink()
    refused = run_cli("train", recipe, "output_dir=parts", "--resume")
    assert refused.code == 2
    assert "every checkpoint is damaged" in refused.err


def test_which_checkpoint(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    save(tmp_path / "checkpoints", 5, best=5)
    newest = save(tmp_path / "checkpoints", 10, best=5)
    assert find_checkpoint(tmp_path, "newest") == newest
    assert find_checkpoint(tmp_path, "10") == newest
    assert find_checkpoint(tmp_path, "best") == checkpoint_path(tmp_path / "checkpoints", 5)
    for which, said in (("7", "existing checkpoints: 5, 10"), ("latest", "expected newest, best or a step")):
        with pytest.raises(UserError, match=said):
            find_checkpoint(tmp_path, which)


def test_a_full_disk_loses_nothing_that_was_saved(recipe, small_disk) -> None:
    """A filesystem that fills up after the second step, and has room again at the fourth."""
    recipe.write_text(recipe.read_text().replace("steps: 2", "steps: 5") + "checkpoint: {every: 1}\n")
    run(recipe, "output_dir=whole")
    folder, ballast = small_disk / "run", small_disk / "ballast"

    def change(trainer, stop) -> None:
        step = trainer.step

        def stepped(n: int):
            if n == 3:
                fill(ballast)
            if n == 4:
                newest, passed_over = newest_whole(folder / "checkpoints")
                assert (step_of(newest), passed_over) == (2, [])
                ballast.unlink()
            return step(n)

        trainer.step = stepped

    ended = run(recipe, f"output_dir={folder}", change=change)
    assert steps(folder / "checkpoints") == [2, 4, 5]
    assert ended.state.step == 5
    same_end(Path("whole"), folder, completions=False)  # the lines of the third step came later


def test_a_disk_that_stays_full_ends_in_one_message_and_can_be_gone_on_from(recipe, small_disk) -> None:
    recipe.write_text(recipe.read_text().replace("steps: 2", "steps: 4") + "checkpoint: {every: 1}\n")
    run(recipe, "output_dir=whole")
    folder, ballast = small_disk / "run", small_disk / "ballast"

    def change(trainer, stop) -> None:
        step = trainer.step
        trainer.step = lambda n: (fill(ballast) if n == 3 else None, step(n))[1]

    with pytest.raises(
        RunError, match=r"step 4 could not be saved.*newest intact checkpoint is .*step-000002.*--resume"
    ):
        run(recipe, f"output_dir={folder}", change=change)
    ballast.unlink()
    run(recipe, f"output_dir={folder}", resume=True)
    same_end(Path("whole"), folder)


def test_what_was_saved_is_not_held_on_to(recipe) -> None:
    """At rest there are the arrays of one state, however long ago another was saved."""
    recipe.write_text(recipe.read_text().replace("steps: 2", "steps: 5") + "checkpoint: {every: 2}\n")
    resting: dict[int, int] = {}

    def change(trainer, stop) -> None:
        step = trainer.step

        def stepped(n: int):
            gc.collect()
            resting[n] = mx.get_active_memory()
            return step(n)

        trainer.step = stepped

    ended = run(recipe, "adapter.type=full", change=change)
    weights = sum(array.nbytes for array in ended.state.trainer.arrays["adapters"].values())
    assert abs(resting[4] - resting[3]) < weights / 4  # a step after the save, and at once after it


def fill(path: Path) -> None:
    """Take all the room there is, to the last byte."""
    size = 1 << 16
    with path.open("wb", buffering=0) as file:
        while size:
            try:
                file.write(b"\0" * size)
            except OSError:
                size //= 2


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of three megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small filesystem is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_file_that_may_not_grow_is_a_full_disk_too(recipe) -> None:
    """Where nothing can be mounted: a limit on the size of files stands in."""
    recipe.write_text(recipe.read_text().replace("steps: 2", "steps: 4") + "checkpoint: {every: 1}\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def change(trainer, stop) -> None:
        step = trainer.step

        def stepped(n: int):
            limit = 1000 if n == 3 else soft
            made = step(n)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            return made

        trainer.step = stepped

    try:
        run(recipe, change=change)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps(Path("runs/toy/checkpoints")) == [1, 2, 4]
    assert [line["step"] for line in timeless(Path("runs/toy/metrics.jsonl"))] == [1, 2, 3, 4]


def test_a_folder_that_vanishes_is_made_anew(recipe, caplog) -> None:
    recipe.write_text(recipe.read_text().replace("steps: 2", "steps: 4") + "checkpoint: {every: 1}\n")

    def change(trainer, stop) -> None:
        step = trainer.step
        trainer.step = lambda n: (shutil.rmtree("runs/toy") if n == 3 else None, step(n))[1]

    ended = run(recipe, change=change)
    assert ended.state.step == 4
    assert "runs/toy was deleted during the run" in caplog.text
    assert steps(Path("runs/toy/checkpoints")) == [3, 4]
    assert [line["step"] for line in timeless(Path("runs/toy/metrics.jsonl"))] == [3, 4]
    assert find_checkpoint(Path("runs/toy"), "newest").name == "step-000004"
