"""Rollouts of `builtin:guess` with a small student, by its environment and by agents, and whether they are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
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
from grpo.rollout import RolloutEngine
from grpo.serving.speaker import Speaker
from grpo.types import Group, Message, Rollout, Task

SEED, LONGEST = 5, 64
ROWS = [GUESS.row(problem) for problem in GUESS.problems("test")[:3]]


def make_student(folder: Path) -> None:
    """One that has learnt to end its turns, and not much more."""
    make(Student(task="builtin:guess", steps=60, warmup=1, hidden=32, layers=1, batch=8), folder, new_model)


class Twins:
    """The same rows played twice."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = load(ModelConfig(name=str(folder)))
        self.generator = Generator(self.model, self.tokenizer, 24)

    def by_the_environment(self, sampling: Sampling, temperature: float = 1.0, n: int = 8) -> list[Rollout]:
        host = make_host(EnvironmentConfig(use="grpo.builtin.guess:Guess"), [], given=Guess)
        table = Table(host, Chat.of(self.tokenizer, [], answers=True))
        try:
            return self._rollouts(Conversations({"": table}, SEED, LONGEST), sampling, temperature, n)
        finally:
            host.close()

    def by_the_agent(
        self, play: Callable[[Client], Any], sampling: Sampling, temperature: float = 1.0, n: int = 8
    ) -> list[Rollout]:
        frontend = Frontend(Speaker(self.tokenizer, self.generator.decoding.vocabulary, None), "student")
        with ThreadPoolExecutor(32) as threads:
            host: Any = AgentHost(play, threads)
            try:
                agents = Agents(host, frontend, ConversationLimits(), SEED, LONGEST, sampling)
                return self._rollouts(agents, sampling, temperature, n)
            finally:
                frontend.close()

    def _rollouts(self, environment: Environment, sampling: Sampling, temperature: float, n: int) -> list[Rollout]:
        engine = RolloutEngine(self.generator, sampling, environment)
        groups: list[Group] = engine.rollout(self._tasks(), n, temperature, mx.random.key(3), True)
        return [rollout for group in groups for rollout in group.rollouts]

    def _tasks(self) -> list[Task]:
        prompts = [[{"role": "user", "content": row["question"]}] for row in ROWS]
        written = [
            self.tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in prompts
        ]
        return [
            Task(at, row["question"], tuple(ids), row) for at, (row, ids) in enumerate(zip(ROWS, written, strict=True))
        ]


def check_same(by_environment: Sequence[Rollout], by_agent: Sequence[Rollout], messages: bool = True) -> None:
    """The same tokens, logprobs, rewards and ends; of agents that ask by messages these, too."""
    for ours, theirs in zip(by_environment, by_agent, strict=True):
        mine, agents = ours.trajectory, theirs.trajectory
        assert agents.conversation is not None
        assert agents.conversation.failure is None, agents.conversation.failure
        assert (agents.token_ids, agents.trained) == (mine.token_ids, mine.trained)
        assert agents.behaviour == pytest.approx(mine.behaviour, abs=1e-5)
        assert agents.finish_reason == mine.finish_reason
        assert mine.conversation is not None
        assert agents.conversation.outcome == mine.conversation.outcome
        assert not messages or agents.conversation.messages == _told_to_the_model(mine.conversation.messages)


def _told_to_the_model(messages: Sequence[Message]) -> Sequence[Message]:
    """All but what is said when the game is over: an agent has nobody to tell it to."""
    return messages[:-1] if messages[-1]["role"] == "user" else messages
