"""The agent that plays `builtin:guess` by the OpenAI client: what it asks the model, and what a game is worth, are its
environment's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("openai")

from guessing import PROBLEMS, Plays, make_student, served_by, turns_of, worth

from grpo.builtin.guess import GUESS
from grpo.model.mlxlm import load_tokenizer
from grpo.plugins import bundled, find_function

run = find_function(f"{bundled('recipes')}/learning/guess_agent.py:run", "agent", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("guess")
    make_student(made)
    return made


@pytest.mark.parametrize("way", ["good", "cheap"])
def test_it_asks_what_the_environment_asks_and_gives_its_reward(folder: Path, way: str) -> None:
    manner = getattr(GUESS, way)
    games = [turns_of(folder, problem, manner) for problem in PROBLEMS]
    says = Plays([turn for _, turns in games for turn in turns])
    with served_by(folder, says) as url:
        rewards = [asyncio.run(run(GUESS.row(problem), url, "key")) for problem in PROBLEMS]
    assert [list(ask.prompt_ids) for ask in says.asks] == [prompt for prompts, _ in games for prompt in prompts]
    assert rewards == [worth(problem, manner) for problem in PROBLEMS]
    assert set(rewards) == ({1.0} if way == "good" else {0.0, 1.0})


def test_a_turn_that_was_cut_ends_the_game_as_in_the_environment(folder: Path) -> None:
    """Even if it has the number: it was not said to its end."""
    problem = PROBLEMS[0]
    says = Plays([load_tokenizer(folder).encode(str(problem[1]))], "length")
    with served_by(folder, says) as url:
        assert asyncio.run(run(GUESS.row(problem), url, "key")) == 0.0
    assert len(says.asks) == 1
