"""The agents of a run: the endpoint by which they ask the model, and who makes trajectories of what they do."""

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

NOTE = "agents ask the model by an endpoint of this process, on this machine alone; each rollout is a session there"


@dataclass(frozen=True, slots=True)
class AgentsByName:
    """Agents of a run by the value of the column `environment`; the only ones go by the empty name.

    `speaker` writes the prompts of all of them, which `longest_answer` tokens may follow.
    """

    agents: Mapping[str, Agents]
    speaker: Speaker
    longest_answer: int

    async def rollout(self, task: Task, sampler: Sampler) -> list[Trajectory]:
        name = "" if "" in self.agents else task.columns[SELECTED_BY]
        return await self.agents[name].rollout(task, sampler)

    def prompts_like(self, readers: Mapping[str, PromptRenderer]) -> None:
        """Let first prompts be as long as those of their source may be."""
        limits = {name: reader.cfg.max_prompt_length for name, reader in readers.items()}
        self.speaker.longest = max(limits.values()) + self.longest_answer
        for agents in self.agents.values():
            agents.limits = limits


def check_endpoint(place: str) -> None:
    """Raise UserError where what the endpoint needs is not installed. `place` is the section that names an agent."""
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
    """Who makes trajectories of what agents ask and are answered. `closing` ends the endpoint, which listens from the
    first rollout on.

    Messages become tokens as `renderer` has prompts of messages, with the same arguments of the chat template. Agents
    may ask for the model by the name `model`.
    """
    assert renderer.vocabulary is not None, "what agents send is checked against it"
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
