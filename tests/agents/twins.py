"""Rollouts of a built-in task with a student, by its environment and by agents, and whether they are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from agency import AgentHost, Client

from grpo.agents.agents import Agents
from grpo.agents.frontend import Frontend
from grpo.builtin.guess import GUESS
from grpo.builtin.student import Student, make
from grpo.builtin.tasks import TASKS
from grpo.config import ModelConfig
from grpo.environments.chat import Chat
from grpo.environments.conversations import Conversations
from grpo.environments.environment import Environment
from grpo.environments.making import make_host
from grpo.environments.play import Table
from grpo.environments.seats import ConversationLimits, Host
from grpo.generation.generator import Generator
from grpo.generation.sampling import Sampling
from grpo.model.load import load
from grpo.model.mlxlm import new_model
from grpo.plugins import bundled
from grpo.recipes import load_recipe
from grpo.rollout import RolloutEngine
from grpo.serving.speaker import Speaker
from grpo.types import Group, Message, Rollout, Task

SEED, LONGEST = 5, 64
ROWS = [GUESS.row(problem) for problem in GUESS.problems("test")[:3]]


def make_student(folder: Path) -> None:
    """One that has learnt to end its turns, and not much more."""
    make(Student(task="builtin:guess", steps=60, warmup=1, hidden=32, layers=1, batch=8), folder, new_model)


class Twins:
    """Rows of a task, played twice: of `guess` unless another is named."""

    def __init__(self, folder: Path, task: str = "guess", rows: Sequence[dict[str, Any]] = ROWS) -> None:
        self.model, self.tokenizer = load(ModelConfig(name=str(folder)))
        self.generator = Generator(self.model, self.tokenizer, 24)
        self.rows, self._task = rows, TASKS[f"builtin:{task}"]
        self._cfg = load_recipe(bundled("recipes") / "learning" / f"{task}.yaml")
        with closing(self._host()) as host:
            self.tools = list(host.description.tools)

    def by_the_environment(self, sampling: Sampling, temperature: float = 1.0, n: int = 8) -> list[Rollout]:
        with closing(self._host()) as host:
            chat = Chat.of(self.tokenizer, self.tools, answers=host.description.kind != "tools")
            talks = Conversations({"": Table(host, chat)}, SEED, LONGEST)
            return self._rollouts(talks, sampling, temperature, n)

    def _host(self) -> Host:
        """The environment's, in this process."""
        return make_host(self._cfg.environment, self._cfg.tools, given=self._task.environment)

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
        return [Task(at, row["question"], self._prompt(row["question"]), row) for at, row in enumerate(self.rows)]

    def _prompt(self, question: str) -> tuple[int, ...]:
        messages, tools = [{"role": "user", "content": question}], self.tools or None
        return tuple(self.tokenizer.apply_chat_template(messages, tools, add_generation_prompt=True, return_dict=False))


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
