"""What looks like a path is one: the Hub is never asked for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.model import load
from grpo.model.load import looks_like_path
from grpo.runs.folder import HEADER


@pytest.mark.parametrize("name", ["runs/nope", "./nope", "../nope", "~/nope", "/nope", "a/b/c", "nope/", "here/nope"])
def test_a_path(tmp_path, monkeypatch, run_cli, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "_fetch", lambda cfg: pytest.fail("the Hub was asked"))
    (tmp_path / "here").mkdir()
    assert looks_like_path(name)
    for command in (["generate", name, "hi"], ["eval", name], ["eval", name, "--data", "builtin:arithmetic"]):
        ran = run_cli(*command)
        assert (ran.code, len(ran.err.splitlines())) == (2, 1)
        assert f"{name}: there is no such folder" in ran.err


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2", "runs-of/mine"])
def test_a_name_on_the_hub(tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert not looks_like_path(name)


def test_a_similar_run_is_named(tmp_path, monkeypatch, run_cli) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/quickstart").mkdir(parents=True)
    for command in (["generate", "runs/quikstart", "hi"], ["eval", "runs/quikstart"]):
        assert "there is no such folder. Did you mean runs/quickstart?" in run_cli(*command).err


COMMANDS = (
    ["report"],
    ["runs", "--follow"],
    ["replay", "--step", "1"],
    ["export", "--format", "mlx"],
    ["rewards", "score", "--reward", "length"],
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_on_a_run_says_what_was_probably_meant(tmp_path, monkeypatch, run_cli, command) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/quickstart")
    (run / "checkpoints/step-000001").mkdir(parents=True)
    (run / "recipe.yaml").write_text(HEADER)
    for name, said in (
        ("runs/quikstart", "there is no such folder. Did you mean runs/quickstart?"),
        ("quickstart", "there is no such folder. Did you mean runs/quickstart?"),
        ("runs/other", "there is no such folder"),
        ("nowhere/quickstart", "there is no such folder. Did you mean runs/quickstart?"),
        ("runs", "not a run's folder; it contains runs: name one of them, such as runs/quickstart"),
        (str(tmp_path), "not a run's folder: it has no recipe.yaml of a run"),
        (f"{run}/checkpoints/step-000001", "not a run's folder, but part of the run runs/quickstart: name the run"),
        (f"{run}/checkpoints", "not a run's folder, but part of the run runs/quickstart: name the run"),
    ):
        ran = run_cli(*command, name)
        assert (ran.code, ran.err) == (2, f"grpo: {name}: {said}\n")
