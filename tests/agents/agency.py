"""Agents that are functions, in threads of this process, and the rollouts that they make of a toy model."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlx.core as mx

from grpo.agents.agents import Agents
from grpo.agents.frontend import Frontend
from grpo.config import ModelConfig
from grpo.environments.seats import ConversationLimits, Description, Reply
from grpo.generation.generator import Generator
from grpo.generation.sampling import Sampling
from grpo.model.load import load
from grpo.rollout import RolloutEngine
from grpo.serving.speaker import Speaker
from grpo.types import Group, Task, Trajectory

SAMPLING, LONGEST = Sampling(1.0, 24), 64
QUESTION = [{"role": "user", "content": "What is 3+3?"}]


@dataclass
class Client:
    """What an agent asks the endpoint with: one connection, or several at once."""

    base_url: str
    api_key: str
    seed: int
    columns: Mapping[str, Any]
    answers: list[dict[str, Any]] = field(default_factory=list)

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 20.0) -> tuple[int, Any]:
        connection = self.begun(path, body, timeout)
        answer = connection.getresponse()
        told = answer.status, json.loads(answer.read())
        connection.close()
        return told

    def begun(self, path: str, body: Mapping[str, Any], timeout: float = 20.0) -> Any:
        """A request whose answer nobody has read yet."""
        at = urlsplit(self.base_url)
        connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=timeout)
        root = at.path.removesuffix("/v1")
        headers = {"Authorization": f"Bearer {self.api_key}", "Content-Type": "application/json"}
        connection.request("POST", root + path, json.dumps(body), headers)
        return connection

    def refused(self, ids: Sequence[int], **params: Any) -> tuple[int, str]:
        """Status and code of what these tokens are refused with."""
        status, told = self.post("/inference/v1/generate", {"token_ids": list(ids), "sampling_params": params})
        return status, told["error"]["code"]

    def tokens(self, ids: Sequence[int], **params: Any) -> dict[str, Any]:
        """The answer to tokens."""
        body = {"token_ids": list(ids), "sampling_params": {"logprobs": 1, **params}}
        status, told = self.post("/inference/v1/generate", body)
        assert status == 200, told
        self.answers.append(told)
        return told

    def chat(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        body = {"messages": list(messages), "logprobs": True, "return_token_ids": True, **more}
        status, told = self.post("/v1/chat/completions", body)
        assert status == 200, told
        self.answers.append(told)
        return told


Agent = Callable[[Client], Any]


@dataclass
class AgentSeat:
    """Runs the agent in a thread of the host's."""

    host: AgentHost
    number: int
    released: int = 0

    def reset(self, columns: Mapping[str, Any], seed: int) -> Future[Reply]:
        self.columns, self.given = columns, seed
        done: Future[Reply] = Future()
        done.set_result(self.host.reset(self))
        return done

    def call(self, tool: str, arguments: Mapping[str, Any]) -> Future[Reply]:
        assert tool == "run"
        self.client = Client(**arguments, columns=self.columns)
        self.host.clients.append(self.client)
        return self.host.threads.submit(self._run)

    def release(self) -> None:
        self.released += 1

    def _run(self) -> Reply:
        try:
            given = self.host.agent(self.client)
        except Exception as error:
            return Reply("error", error=f"{type(error).__name__}: {error}")
        if isinstance(given, Reply):
            return given
        reward, metrics = given if isinstance(given, tuple) else (given, {})
        return Reply(value=json.dumps({"reward": reward, "metrics": metrics}))


class AgentHost:
    """See `grpo.environments.seats.Host`."""

    description = Description("solver")

    def __init__(self, agent: Agent, threads: ThreadPoolExecutor) -> None:
        self.agent, self.threads = agent, threads
        self.clients: list[Client] = []
        self.all: list[AgentSeat] = []
        self.reset: Callable[[AgentSeat], Reply] = lambda _: Reply()

    def seats(self, group: int, n: int) -> list[AgentSeat]:
        seats = [AgentSeat(self, number) for number in range(n)]
        self.all += seats
        return seats


class Agency:
    """A toy model whose rollouts are agents'."""

    def __init__(self, folder: Path, slots: int = 16) -> None:
        self.model, self.tokenizer = load(ModelConfig(name=str(folder)))
        self.generator = Generator(self.model, self.tokenizer, slots)
        vocabulary = self.generator.decoding.vocabulary
        self.speaker = Speaker(self.tokenizer, vocabulary, None)
        self.frontend = Frontend(self.speaker, "toy")
        self.threads = ThreadPoolExecutor(32)
        self.prompt = tuple(self.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False))

    def tasks(self, count: int = 1) -> list[Task]:
        return [Task(place, QUESTION, self.prompt, {"answer": "6", "place": place}) for place in range(count)]

    def host(self, agent: Agent) -> AgentHost:
        return AgentHost(agent, self.threads)

    def roll(
        self,
        agent: Agent | AgentHost,
        n: int = 2,
        tasks: int = 1,
        sampling: Sampling = SAMPLING,
        limits: ConversationLimits = ConversationLimits(),  # noqa: B008
        longest: int = LONGEST,
        logprobs: bool = True,
        temperature: float | None = None,
    ) -> list[Group]:
        host = agent if isinstance(agent, AgentHost) else self.host(agent)
        environment = Agents(host, self.frontend, limits, 7, longest, sampling)  # type: ignore[arg-type]
        self.speaker.longest = longest + sampling.max_tokens
        engine = RolloutEngine(self.generator, sampling, environment)
        at = sampling.temperature if temperature is None else temperature
        return engine.rollout(self.tasks(tasks), n, at, mx.random.key(3), logprobs)

    def one(self, agent: Agent | AgentHost, **how: Any) -> Trajectory:
        """The only rollout of one agent."""
        (group,) = self.roll(agent, n=1, **how)
        return group.rollouts[0].trajectory


@contextmanager
def agency(folder: Path, slots: int = 16) -> Iterator[Agency]:
    made = Agency(folder, slots)
    try:
        yield made
    finally:
        made.frontend.close()
        made.threads.shutdown()


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls side by side."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def servers() -> int:
    """The servers of this process's agents."""
    return sum(thread.name == "agents' server" for thread in threading.enumerate())
