"""A game as an environment and as an agent by OpenAI's client: the same rollouts, token for token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("openai")

from agency import AgentHost, Client

from grpo.agents.agents import Agents
from grpo.agents.frontend import Frontend
from grpo.builtin.guess import GUESS, Guess
from grpo.builtin.student import Student, make
from grpo.config import EnvironmentConfig, ModelConfig
from grpo.environments.chat import Chat
from grpo.environments.conversations import Conversations
from grpo.environments.environment import Environment
from grpo.environments.making import make_host
from grpo.environments.play import Table
from grpo.environments.seats import ConversationLimits
from grpo.generation.generator import Generator
from grpo.generation.sampling import Sampling
from grpo.model.load import load
from grpo.model.mlxlm import new_model
from grpo.plugins import bundled, find_function
from grpo.rollout import RolloutEngine
from grpo.serving.speaker import Speaker
from grpo.types import Group, Task

run = find_function(f"{bundled('recipes')}/learning/guess_agent.py:run", "agent", True)
SEED, LONGEST = 5, 64


class Games:
    """The games of a small student, with a few tokens each so that turns and conversations are also cut."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = load(ModelConfig(name=str(folder)))
        self.generator = Generator(self.model, self.tokenizer, 24)

    def rollouts(self, environment: Environment, sampling: Sampling, temperature: float) -> list[Group]:
        engine = RolloutEngine(self.generator, sampling, environment)
        return engine.rollout(self._tasks(), 8, temperature, mx.random.key(3), True)

    def by_the_environment(self, sampling: Sampling, temperature: float) -> list[Group]:
        host = make_host(EnvironmentConfig(use="grpo.builtin.guess:Guess"), [], given=Guess)
        table = Table(host, Chat.of(self.tokenizer, [], answers=True))
        try:
            return self.rollouts(Conversations({"": table}, SEED, LONGEST), sampling, temperature)
        finally:
            host.close()

    def by_the_agent(self, sampling: Sampling, temperature: float, play: Callable[[Client], Any]) -> list[Group]:
        frontend = Frontend(Speaker(self.tokenizer, self.generator.decoding.vocabulary, None), "student")
        with ThreadPoolExecutor(32) as threads:
            host: Any = AgentHost(play, threads)
            agents = Agents(host, frontend, ConversationLimits(), SEED, LONGEST, sampling)
            try:
                return self.rollouts(agents, sampling, temperature)
            finally:
                frontend.close()

    def _tasks(self) -> list[Task]:
        rows = [GUESS.row(problem) for problem in GUESS.problems("train")[:3]]
        return [self._task(place, row) for place, row in enumerate(rows)]

    def _task(self, place: int, row: dict[str, Any]) -> Task:
        prompt = [{"role": "user", "content": row["question"]}]
        ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        return Task(place, row["question"], tuple(ids), row)


@pytest.fixture(scope="module")
def games(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Games]:
    """Of a student that has learnt to end its turns, and not much more."""
    folder = tmp_path_factory.mktemp("guess")
    make(Student(task="builtin:guess", steps=60, warmup=1, hidden=32, layers=1, batch=8), folder, new_model)
    yield Games(folder)


def plays(client: Client) -> float:
    return asyncio.run(run(client.columns, client.base_url, client.api_key))


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_the_agent_makes_the_rollouts_of_its_environment(games: Games, temperature: float) -> None:
    sampling = Sampling(1.0, 48)
    pairs = [
        (ours, theirs)
        for one, other in zip(
            games.by_the_environment(sampling, temperature),
            games.by_the_agent(sampling, temperature, plays),
            strict=True,
        )
        for ours, theirs in zip(one.rollouts, other.rollouts, strict=True)
    ]
    for ours, theirs in pairs:
        mine, agents = ours.trajectory, theirs.trajectory
        assert agents.token_ids == mine.token_ids
        assert agents.trained == mine.trained
        assert agents.behaviour == pytest.approx(mine.behaviour, abs=1e-5)
        assert agents.finish_reason == mine.finish_reason
        assert mine.conversation is not None
        assert agents.conversation is not None
        assert (agents.conversation.failure, agents.conversation.outcome) == (None, mine.conversation.outcome)
        messages = mine.conversation.messages
        if messages[-1]["role"] == "user":  # what is said when the game is over: the agent has nobody to tell it to
            messages = messages[:-1]
        assert agents.conversation.messages == messages
    assert {ours.trajectory.finish_reason for ours, _ in pairs} == ({"done", "length"} if temperature else {"done"})
