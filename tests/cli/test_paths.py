"""What looks like a path is one: the Hub is never asked for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.model import load
from grpo.model.load import looks_like_path


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
