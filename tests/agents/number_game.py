"""The number game as an environment of verifiers: its rows, what they are worth, and who plays them."""

from __future__ import annotations

from typing import Any

import verifiers.v1 as vf
from twins import ROWS

from grpo.builtin.guess import Guess
from grpo.plugins import bundled, find_function

__all__ = ["NumberGame", "Player"]

agent = find_function(f"{bundled('recipes')}/learning/guess_agent.py:run", "agent", True)


class Number(vf.TaskData):
    question: str
    number: int


class Game(vf.Task[Number]):
    @vf.reward(weight=1.0)
    async def found(self, trace: vf.Trace) -> float:
        """By what the trace has of the model's turns."""
        game = Guess()
        game.reset(number=self.data.number)
        for message in trace.branches[-1].messages:
            if message.role == "assistant":
                game.step(message.content or "")
        return game.get_reward()


class NumberGame(vf.Taskset[Game, vf.TasksetConfig]):
    def load(self) -> list[Game]:
        return [Game(Number(prompt=row["question"], **row)) for row in ROWS]


class Player(vf.Harness[vf.HarnessConfig]):
    """Plays in this process, by the OpenAI client, against verifiers' own endpoint."""

    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any
    ) -> vf.ProgramResult:
        await agent({"question": data.question, "number": data.number}, endpoint, secret)
        return vf.ProgramResult(0, "", "")


async def played(number: int, base_url: str, api_key: str, tokenizer: str) -> vf.Trace:
    """A game of the row with this number by verifiers' training client, whose model is asked at `base_url`."""
    env = vf.SingleAgentEnv(
        vf.SingleAgentEnvConfig(
            taskset=vf.TasksetConfig(id=__name__),
            agent=vf.AgentConfig(harness=vf.HarnessConfig(id=__name__), runtime=vf.SubprocessConfig()),
        )
    )
    authorization = {"Authorization": f"Bearer {api_key}"}
    client = vf.TrainClientConfig(base_url=base_url, headers=authorization, renderer_model_name=tokenizer)
    task = next(task for task in env.taskset if task.data.number == number)
    async with env.serving():
        episode = await env.run_episode(task, vf.ModelContext("policy", client))
    assert episode.ok, episode
    (trace,) = episode.traces
    return trace
