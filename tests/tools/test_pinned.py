"""Commands that use a run load its model at the commit that the run was trained from, whatever adapter they take."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from grpo.config import ModelConfig
from grpo.door import opening
from grpo.errors import UserError
from grpo.runs import prepare
from grpo.tools import generate

COMMIT = "1" * 40
NEWEST = "runs/toy/checkpoints/step-000002"
GENERATE, EVAL = ["generate", "runs/toy", "What is 3+3?"], ["eval", "runs/toy"]


@pytest.fixture
def asked(recipe, toy_folder, run_cli, monkeypatch) -> list[ModelConfig]:
    """The models that commands ask for after a run, which was trained from a commit. They get none.

    Beside the run there is an adapter that says nothing of commits.
    """
    monkeypatch.setattr(opening, "revisions_of", lambda cfg: {f"model {toy_folder}": COMMIT})
    ran = run_cli("train", recipe, "eval={split: train, prompts: 2, samples: 1, every: 2}", "checkpoint.every=1")
    assert ran.code == 0, ran.err
    shutil.copytree(NEWEST, "bare")
    Path("bare/state.json").unlink()
    asked: list[ModelConfig] = []

    def load(cfg: ModelConfig, *_: object) -> None:
        asked.append(cfg)
        raise UserError("no model today")

    monkeypatch.setattr(generate, "load", load)
    monkeypatch.setattr(prepare, "load", load)
    return asked


def test_the_commit_of_the_run_is_used_by_each_command(asked, run_cli) -> None:
    commands = [
        GENERATE,
        [*GENERATE, "--base"],
        [*GENERATE, "--adapter", "bare"],
        [*GENERATE, "--adapter", "runs/toy/checkpoints/step-000001"],
        ["generate", NEWEST, "What is 3+3?"],
        EVAL,
        [*EVAL, "--adapter", "bare"],
        [*EVAL, "--checkpoint", "1"],
        ["replay", "runs/toy", "--step", "1"],
        ["replay", "runs/toy", "--step", "2"],
    ]
    for command in commands:
        ran = run_cli(*command)
        assert (ran.code, ran.err) == (2, "grpo: no model today\n"), command
    assert [cfg.revision for cfg in asked] == [COMMIT] * len(commands)
    shutil.rmtree("runs/toy/checkpoints")  # a run without a checkpoint has no commits
    assert run_cli(*GENERATE, "--base").err == "grpo: no model today\n"
    assert asked[-1].revision is None
