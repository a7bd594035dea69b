"""The copy of the adapter that a run began from outlives a kill at any moment of its replacement."""

import shutil
from pathlib import Path

import pytest
from runs.driver import run

from grpo.recipes import load_recipe
from grpo.runs import starting
from grpo.runs.checkpoint import checkpoints

WEIGHTS = "adapters.safetensors"


class KilledError(BaseException):
    """In the place of a kill: nothing catches it, nothing tidies up."""


def with_copies(tmp_path: Path) -> Path:
    """A run with an old copy, and a new one that is made aside."""
    folder = tmp_path / "run"
    for name, text in ((starting.STARTING, "old"), (starting.partial(starting.STARTING), "new")):
        (folder / name).mkdir(parents=True)
        (folder / name / WEIGHTS).write_text(text)
    return folder


def beginning(recipe: Path, folder: Path) -> str:
    cfg = starting.with_kept(load_recipe(recipe, ["adapter.path=gone"]), folder)
    return (Path(cfg.adapter.path) / WEIGHTS).read_text()


@pytest.mark.parametrize("calls", range(7))
def test_a_kill_while_it_is_replaced_leaves_one_of_them(recipe, tmp_path, monkeypatch, calls: int) -> None:
    """Killed before the first, the second, ... call that changes the disk; then it is replaced again."""
    folder = with_copies(tmp_path)
    left = [calls]

    def counted(call):
        def wrapper(*args, **kwargs):
            if left[0] == 0:
                raise KilledError
            left[0] -= 1
            return call(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", counted(Path.rename))
        patched.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patched.setattr(starting, "sync", counted(starting.sync))
        try:
            starting.put_copies([starting.STARTING], folder)
            assert calls > 4
        except KilledError:
            assert calls <= 4
    assert beginning(recipe, folder) in ("old", "new")
    again = folder / starting.partial(starting.STARTING)
    shutil.rmtree(again, ignore_errors=True)
    again.mkdir()
    (again / WEIGHTS).write_text("newer")
    starting.put_copies([starting.STARTING], folder)
    assert beginning(recipe, folder) == "newer"
    assert [path.name for path in folder.iterdir()] == [starting.STARTING]


def test_a_run_whose_copy_was_put_aside_goes_on(recipe) -> None:
    first = run(recipe, "output_dir=first").checkpoint
    recipe.write_text(recipe.read_text() + "checkpoint: {every: 1}\n")
    run(recipe, f"adapter.path={first}", "output_dir=begun")
    shutil.rmtree("first")
    shutil.rmtree(checkpoints(Path("begun/checkpoints"))[-1])
    Path("begun", starting.STARTING).rename(Path("begun", starting.put_aside(starting.STARTING)))
    assert run(Path("begun/recipe.yaml"), "output_dir=begun", resume=True).state.step == 2
    assert Path("begun", starting.STARTING, WEIGHTS).is_file()
    assert not Path("begun", starting.put_aside(starting.STARTING)).exists()
