"""Games of `builtin:guess` over a socket, in which the model says what a test tells it to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from listening import listening
from saying import Base
from tokenizers import Tokenizer

from grpo.builtin.exercise import Manner
from grpo.builtin.guess import GUESS, Guess
from grpo.builtin.student import Student, lesson, make
from grpo.generation.sampling import Sampling
from grpo.model.mlxlm import load_tokenizer, new_model
from grpo.serving.asks import Ask, Piece, Ticket
from grpo.serving.service import Service
from grpo.serving.sessions import SessionRules
from grpo.serving.speaker import Speaker

PROBLEMS = GUESS.problems("test")[:12]


def make_student(folder: Path) -> None:
    """The task's student after two steps: its tokenizer is the whole student's."""
    make(Student(task="builtin:guess", steps=2, warmup=1, hidden=16), folder, new_model)


class Plays:
    """In the place of a decoder: says these turns, and remembers what it was asked."""

    ended = False

    def __init__(self, turns: Sequence[Sequence[int]], reason: Any = "stop") -> None:
        self.turns, self.reason = iter(turns), reason
        self.asks: list[Ask] = []

    def submit(self, ask: Ask, tell: Any) -> Ticket:
        self.asks.append(ask)
        ids = tuple(next(self.turns))
        tell([Piece(0, ids, (-0.5,) * len(ids), self.reason)])
        return Ticket(ask, tell)

    def cancel(self, ticket: Ticket) -> None:
        """Nothing to do: it has ended."""


class Policy(Base):
    def find(self, name: str) -> str | None:
        return "policy" if name == "policy" else None


@contextmanager
def served_by(folder: Path, says: Plays) -> Iterator[str]:
    """The base URL of a session at an endpoint whose model says that."""
    tokenizer = load_tokenizer(folder)
    speaker = Speaker(tokenizer, len(tokenizer.get_vocab()), 4096)
    rules = SessionRules(sampling := Sampling(1.0, 96), sampling)
    service = Service(says, speaker, Policy(), sampling, sessions_only=True)
    service.open("game", rules)
    with listening(service) as there:
        yield f"{there.url}/s/game/v1"


def turns_of(folder: Path, problem: Any, way: Manner) -> tuple[list[list[int]], list[list[int]]]:
    """What the model reads before each of its turns, from the first token on, and the turns: as a run has them."""
    ids, said = lesson(Tokenizer.from_file(str(folder / "tokenizer.json")), GUESS, problem, way)
    prompts: list[list[int]] = []
    turns: list[list[int]] = []
    for place, token in enumerate(ids):
        if said[place] and not said[place - 1]:
            prompts.append(ids[:place])
            turns.append([])
        if said[place]:
            turns[-1].append(token)
    return prompts, turns


def worth(problem: Any, way: Manner) -> float:
    """The environment's reward for a way to play."""
    game = Guess()
    game.reset(**GUESS.row(problem))
    for message in GUESS.conversation(problem, way):
        if message["role"] == "assistant":
            game.step(message["content"])
    return game.get_reward()
