"""A run's folder: made, refused, replaced, locked, and found again."""

import subprocess
import sys
from pathlib import Path

import pytest

from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.folder import HEADER, WRITTEN, is_running, newest_checkpoint, run_folder

HOLD = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_without_a_checkpoint_says_so(recipe) -> None:
    with pytest.raises(UserError, match="no checkpoint yet"):
        newest_checkpoint(recipe.parent)


def killed(folder, name: str) -> None:
    """What a run leaves that was to replace another and was killed: its recipe, and the former one aside."""
    (folder / ".former").mkdir()
    for path in list(folder.iterdir()):
        if path.name != ".former":
            path.rename(folder / ".former" / path.name)
    (folder / "recipe.yaml").write_text(HEADER + f"# {name}")


def test_a_run_killed_while_replacing_another(recipe) -> None:
    cfg = load_recipe(recipe)
    folder = Path(cfg.output_dir)
    with run_folder(cfg, overwrite=False):
        (folder / "metrics.jsonl").write_text("a")
    killed(folder, "b")  # before its first step: the former run comes back
    with pytest.raises(UserError, match="already holds a run"), run_folder(cfg, overwrite=False):
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "recipe.yaml"]
    assert "# b" not in (folder / "recipe.yaml").read_text()
    killed(folder, "c")
    (folder / "metrics.jsonl").write_text("c")  # after it: the former run is gone
    with run_folder(cfg, overwrite=True):
        assert not (folder / "metrics.jsonl").exists()
        assert (folder / ".former/metrics.jsonl").read_text() == "c"
    assert (folder / "metrics.jsonl").read_text() == "c"  # nothing was on record, so it came back


@pytest.mark.parametrize("moved", range(5))
def test_a_run_killed_while_putting_another_aside(recipe, moved: int) -> None:
    cfg = load_recipe(recipe)
    folder = Path(cfg.output_dir)
    with run_folder(cfg, overwrite=False):
        for name in ("metrics.jsonl", "eval.jsonl", "checkpoints", "wandb"):
            (folder / name).write_text(name)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    (folder / ".former").mkdir()
    for name in [name for name in WRITTEN if name in before][:moved]:
        (folder / name).rename(folder / ".former" / name)
    with pytest.raises(UserError, match="already holds a run"), run_folder(cfg, overwrite=False):
        pass
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_a_checkpoint_stays_where_no_step_is_on_record(recipe) -> None:
    """A run may fail between a step, which is then saved, and its record."""
    cfg = load_recipe(recipe)
    folder = Path(cfg.output_dir)
    saved = folder / "checkpoints/step-000001/state.json"
    with run_folder(cfg, overwrite=False):
        saved.parent.mkdir(parents=True)
        saved.write_text("")
        (folder / ".ended").write_text("failed\nZeroDivisionError\n")
    with pytest.raises(UserError, match="already holds a run"), run_folder(cfg, overwrite=False):
        pass
    assert saved.exists()
    killed(folder, "b")
    (folder / "checkpoints/step-000002").mkdir(parents=True)  # saved, so the former run is gone
    with pytest.raises(UserError, match="already holds a run"), run_folder(cfg, overwrite=False):
        pass
    assert (folder / "checkpoints/step-000002").exists()
    assert not (folder / ".former").exists()


def test_a_folder_that_cannot_be_written_keeps_its_run(recipe, monkeypatch) -> None:
    cfg = load_recipe(recipe)
    folder = Path(cfg.output_dir)
    with run_folder(cfg, overwrite=False):
        (folder / "metrics.jsonl").write_text("a")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match="No space left on device"), run_folder(cfg, overwrite=True):
            pass
    assert (folder / "metrics.jsonl").read_text() == "a"
    assert (folder / "recipe.yaml").exists()
    assert not (folder / ".former").exists()


def test_a_folder_in_which_a_run_goes_on_is_not_for_another(recipe) -> None:
    cfg = load_recipe(recipe)
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True)
    assert not is_running(folder)
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert is_running(folder)
        (folder / ".former").mkdir()  # as of a run that is replacing another just now
        with (
            pytest.raises(UserError, match="another process is training in"),
            run_folder(cfg, overwrite=False),
        ):
            pass
        (folder / ".former").rmdir()
        other.communicate("")
    assert not is_running(folder)
    with run_folder(cfg, overwrite=False):
        assert (folder / ".lock").exists()
    assert not folder.exists()  # nothing was recorded there
