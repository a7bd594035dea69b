"""An environment of verifiers with its own training client, where the package is installed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("verifiers", reason="verifiers is not installed")

from guessing import PROBLEMS, Plays, make_student, served_by, turns_of, worth

from grpo.builtin.guess import GUESS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("guess")
    make_student(made)
    return made


@pytest.mark.parametrize("way", ["good", "cheap"])
def test_its_environment_asks_what_ours_asks(folder: Path, way: str) -> None:
    import number_game

    for row, problem in enumerate(PROBLEMS[:4]):
        prompts, turns = turns_of(folder, problem, getattr(GUESS, way))
        says = Plays(turns)
        with served_by(folder, says) as url:
            trace = asyncio.run(number_game.played(row, url, str(folder)))
        assert [list(ask.prompt_ids) for ask in says.asks] == prompts
        assert trace.reward == worth(problem, getattr(GUESS, way))
        (branch,) = trace.branches
        assert branch.token_ids[: len(prompts[-1])] == prompts[-1]
