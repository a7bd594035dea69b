"""The agent that plays `builtin:guess` by the OpenAI client: what it asks the model, and what a game is worth, are its
environment's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("openai")

from listening import at_a_port
from saying import Base
from tokenizers import Tokenizer

from grpo.builtin.exercise import Manner
from grpo.builtin.guess import GUESS, Guess
from grpo.builtin.student import Student, lesson, make
from grpo.generation.sampling import Sampling
from grpo.model.mlxlm import load_tokenizer, new_model
from grpo.plugins import bundled, find_function
from grpo.serving.app import application
from grpo.serving.asks import Ask, Piece, Ticket
from grpo.serving.guard import Guard
from grpo.serving.service import Service
from grpo.serving.speaker import Speaker

PROBLEMS = GUESS.problems("test")[:12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task's student after two steps: its tokenizer is the whole student's."""
    made = tmp_path_factory.mktemp("guess")
    make(Student(task="builtin:guess", steps=2, warmup=1, hidden=16), made, new_model)
    return made


class Plays:
    """In the place of a decoder: says these turns, and remembers what it was asked."""

    ended = False

    def __init__(self, turns: Sequence[Sequence[int]], reason: Any = "stop") -> None:
        self.turns, self.reason = iter(turns), reason
        self.asks: list[Ask] = []

    def submit(self, ask: Ask, tell: Any) -> Ticket:
        self.asks.append(ask)
        ids = tuple(next(self.turns))
        tell([Piece(0, ids, (0.0,) * len(ids), self.reason)])
        return Ticket(ask, tell)

    def cancel(self, ticket: Ticket) -> None:
        """Nothing to do: it has ended."""


class Policy(Base):
    def find(self, name: str) -> str | None:
        return "policy" if name == "policy" else None


def played_by_the_agent(folder: Path, problems: Sequence[Any], says: Plays) -> list[float]:
    """What the agent says that games are worth, one after the other, when the model says these turns."""
    run = find_function(f"{bundled('recipes')}/learning/guess_agent.py:run", "agent", True)
    tokenizer = load_tokenizer(folder)
    speaker = Speaker(tokenizer, len(tokenizer.get_vocab()), 4096)
    service = Service(says, speaker, Policy(), Sampling(1.0, 96))  # type: ignore[arg-type]
    with at_a_port(application(service, Guard())) as url:
        return [asyncio.run(run(GUESS.row(problem), url, "key")) for problem in problems]


def turns_of(folder: Path, problem: Any, way: Manner) -> tuple[list[list[int]], list[list[int]]]:
    """What the model reads before each of its turns, from the first token on, and the turns: as a run has them."""
    ids, said = lesson(Tokenizer.from_file(str(folder / "tokenizer.json")), GUESS, problem, way)
    prompts, turns = [], []
    for place, token in enumerate(ids):
        if said[place] and not said[place - 1]:
            prompts.append(ids[:place])
            turns.append([])
        if said[place]:
            turns[-1].append(token)
    return prompts, turns


@pytest.mark.parametrize("way", ["good", "cheap"])
def test_it_asks_what_the_environment_asks_and_gives_its_reward(folder: Path, way: str) -> None:
    manner = getattr(GUESS, way)
    games = [turns_of(folder, problem, manner) for problem in PROBLEMS]
    says = Plays([turn for _, turns in games for turn in turns])
    rewards = played_by_the_agent(folder, PROBLEMS, says)
    assert [list(ask.prompt_ids) for ask in says.asks] == [prompt for prompts, _ in games for prompt in prompts]
    assert rewards == [worth(problem, manner) for problem in PROBLEMS]
    assert set(rewards) == ({1.0} if way == "good" else {0.0, 1.0})


def worth(problem: Any, way: Manner) -> float:
    """The environment's reward for a way to play."""
    game = Guess()
    game.reset(**GUESS.row(problem))
    for message in GUESS.conversation(problem, way):
        if message["role"] == "assistant":
            game.step(message["content"])
    return game.get_reward()


def test_a_turn_that_was_cut_ends_the_game_as_in_the_environment(folder: Path) -> None:
    """Even if it has the number: it was not said to its end."""
    problem = PROBLEMS[0]
    tokenizer = load_tokenizer(folder)
    says = Plays([tokenizer.encode(str(problem[1]))], "length")
    assert played_by_the_agent(folder, [problem], says) == [0.0]
    assert len(says.asks) == 1
