"""The agents of a run: the endpoint by which they ask the model, and who makes trajectories of what they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo.agents.agents import Agents
from grpo.agents.frontend import Frontend
from grpo.backend.imports import extra
from grpo.config import EnvironmentConfig, RolloutConfig
from grpo.config.data import SELECTED_BY
from grpo.data.prompts import PromptRenderer
from grpo.environments.sampler import Sampler
from grpo.environments.seats import ConversationLimits, Host
from grpo.rollout import sampling_of
from grpo.serving.speaker import Speaker
from grpo.types import Task, Trajectory

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper

NOTE = "agents ask the model by an endpoint of this process, on this machine alone; each rollout is a session there"


@dataclass(frozen=True, slots=True)
class AgentsByName:
    """The agents of a run by the value of the column `environment`; the only ones go by the empty name."""

    agents: Mapping[str, Agents]

    async def rollout(self, task: Task, sampler: Sampler) -> list[Trajectory]:
        name = "" if "" in self.agents else task.columns[SELECTED_BY]
        return await self.agents[name].rollout(task, sampler)

    def prompts_like(self, readers: Mapping[str, PromptRenderer]) -> None:
        """Let first prompts be as long as the prompts of each source may be."""
        for agents in self.agents.values():
            agents.limits = {name: reader.cfg.max_prompt_length for name, reader in readers.items()}


def check_endpoint(place: str) -> None:
    """Raise UserError where what the endpoint needs is not installed. `place` is the section that names an agent."""
    with extra("serve", place):
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401


def endpoint(
    tokenizer: TokenizerWrapper, renderer: PromptRenderer, vocabulary: int, model: str, rollout: RolloutConfig
) -> Frontend:
    """The server that agents ask, which listens from the first rollout on. `model` is the model's own name.

    Messages become tokens as `renderer` has prompts of messages, by the same arguments of the chat template.
    """
    longest = renderer.cfg.max_prompt_length + rollout.max_completion_length
    return Frontend(Speaker(tokenizer, vocabulary, longest, renderer.cfg.chat_template_kwargs), model)


def agents_of(
    hosts: Mapping[str, tuple[Host, EnvironmentConfig]],
    frontend: Frontend,
    renderer: PromptRenderer,
    rollout: RolloutConfig,
    seed: int,
) -> AgentsByName:
    """Who makes trajectories of what agents ask and are answered."""
    cfg, recipe = renderer.cfg, sampling_of(rollout)
    return AgentsByName(
        {
            name: Agents(
                host,
                frontend,
                ConversationLimits(config.max_turns, None, config.max_turn_tokens, config.rollout_timeout),
                seed,
                cfg.max_prompt_length,
                recipe,
                cfg.system,
                config.thinking == "keep",
            )
            for name, (host, config) in hosts.items()
        }
    )
