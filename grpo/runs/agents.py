"""The agents of a run: the endpoint through which they call the model, and the environment that they are together."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo.agents.agents import Agents
from grpo.agents.frontend import Frontend
from grpo.backend.imports import extra
from grpo.config import EnvironmentConfig, RolloutConfig
from grpo.config.data import SELECTED_BY
from grpo.data.prompts import PromptRenderer
from grpo.environments.making import limits_of
from grpo.environments.sampler import Sampler
from grpo.environments.seats import Host
from grpo.rollout import sampling_of
from grpo.serving.speaker import Speaker
from grpo.types import Task, Trajectory

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper

NOTE = "agents call the model through an endpoint of this process, on this machine only; each rollout is one session"


@dataclass(frozen=True, slots=True)
class AgentsByName:
    """The agents of a run by the value of the column `environment`. The agents of a single environment have the empty
    name.

    `speaker` writes the prompts of all agents. Up to `longest_answer` tokens may follow a prompt.
    """

    agents: Mapping[str, Agents]
    speaker: Speaker
    longest_answer: int

    async def rollout(self, task: Task, sampler: Sampler) -> list[Trajectory]:
        name = "" if "" in self.agents else task.columns[SELECTED_BY]
        return await self.agents[name].rollout(task, sampler)

    def prompts_like(self, readers: Mapping[str, PromptRenderer]) -> None:
        """Limit the first prompt of a session to the `max_prompt_length` of its source."""
        limits = {name: reader.cfg.max_prompt_length for name, reader in readers.items()}
        self.speaker.longest = max(limits.values()) + self.longest_answer
        for agents in self.agents.values():
            agents.limits = limits


def check_endpoint(place: str) -> None:
    """Raise UserError if packages that the endpoint needs are missing. `place` is the section that names an agent."""
    with extra("serve", place):
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401


def agents_of(
    hosts: Mapping[str, tuple[Host, EnvironmentConfig]],
    tokenizer: TokenizerWrapper,
    renderer: PromptRenderer,
    rollout: RolloutConfig,
    seed: int,
    model: str,
    closing: ExitStack,
) -> AgentsByName:
    """The environment that turns the requests of agents and their answers into trajectories.

    `closing` stops the endpoint, which starts to listen at the first rollout. Messages become tokens as they do in
    prompts by `renderer`, with the same chat template arguments. Agents may request the model by the name `model`.
    """
    assert renderer.vocabulary is not None, "token ids that agents send are checked against the vocabulary"
    cfg, recipe, answer = renderer.cfg, sampling_of(rollout), rollout.max_completion_length
    longest = cfg.max_prompt_length + answer
    speaker = Speaker(tokenizer, renderer.vocabulary, longest, cfg.chat_template_kwargs)
    frontend = Frontend(speaker, model)
    closing.callback(frontend.close)
    common = seed, cfg.max_prompt_length, recipe, cfg.system
    agents = {
        name: Agents(host, frontend, limits_of(config), *common, config.thinking == "keep")
        for name, (host, config) in hosts.items()
    }
    return AgentsByName(agents, speaker, answer)
