"""The model's conversation partners in a run: hosts of environments and tools, or an environment with `rollout`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.config import EnvironmentConfig, RolloutConfig, ToolConfig
from grpo.config.data import SELECTED_BY
from grpo.data.prompts import PromptRenderer, Tools, last_text
from grpo.environments.anew import Anew
from grpo.environments.chat import DROPS, KEEPS, Chat
from grpo.environments.conversations import Conversations
from grpo.environments.environment import Environment
from grpo.environments.making import limits_of, make_host
from grpo.environments.play import Table
from grpo.environments.seats import Content, Description, Host
from grpo.errors import UserError
from grpo.runs.agents import NOTE, agents_of, check_endpoint
from grpo.runs.given import Given
from grpo.types import Task

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper

IN_PROCESSES = {"workers", "sandbox", "env", "memory_gb"}
"""Settings of the worker processes of environments. Objects given from Python live in the trainer's process instead."""
ANSWERING = ("messages", "text")
"""The kinds of environments that reply in the role of the user."""


@dataclass(frozen=True, slots=True)
class Partners:
    """All conversation partners of the model. They can describe themselves before a model or template is loaded.

    hosts   the host of each environment and its section of the recipe, by the value of the column `environment`; a
            single environment has the empty name. Empty if a completion is a single answer.
    own     an environment with a method `rollout`, instead of hosts
    opened  closes what else belongs to the partners: the endpoint of agents
    """

    hosts: Mapping[str, tuple[Host, EnvironmentConfig]] = field(default_factory=dict)
    own: Environment | None = None
    opened: ExitStack = field(default_factory=ExitStack)

    @property
    def are_agents(self) -> bool:
        """Whether they are agents: programs that call the model, instead of being called."""
        return any(config.is_agent for _, config in self.hosts.values())

    @property
    def tools(self) -> Tools:
        """The tools to show in prompts: for a single environment a list, for several a list by environment name."""
        tools = {name: host.description.tools for name, (host, _) in self.hosts.items()}
        return tools.get("", tools) if len(tools) < 2 else tools

    @property
    def resets(self) -> bool:
        """Whether prompts may be longer than those in the data, because `reset` adds to them or agents write them."""
        return any(host.description.resets for host, _ in self.hosts.values())

    def environment(
        self,
        tokenizer: TokenizerWrapper,
        renderer: PromptRenderer,
        task: Task,
        rollout: RolloutConfig,
        seed: int,
        keeps_seats: bool = False,
        model: str = "policy",
    ) -> tuple[Environment | None, list[str]]:
        """The environment that makes trajectories (None: single answers), and notes for the plan on its conversations.

        `task` is any task of `renderer`; it shows whether prompts are texts or messages. Agents may request the model
        by the name `model`. Raises UserError if the chat template cannot render these conversations.
        """
        if not self.hosts:
            return self.own, []
        if self.are_agents:
            agents = [described(host.description) for host, _ in self.hosts.values()]
            return agents_of(self.hosts, tokenizer, renderer, rollout, seed, model, self.opened), [*agents, NOTE]
        templated = renderer.wraps_text or not isinstance(task.prompt, str)
        tables, notes = {}, []
        for name, (host, config) in self.hosts.items():
            description = host.description
            chat = Chat.of(
                tokenizer,
                description.tools,
                renderer.cfg.chat_template_kwargs,
                answers=description.kind in ANSWERING,
                templated=templated,
                stop_ids=rollout.stop_token_ids,
            )
            anew = _anew(place_of(name), chat) if config.thinking == "drop" else None
            tables[name] = Table(host, chat, limits_of(config), keeps_seats, anew)
            of_chat = [DROPS if anew and note.startswith(KEEPS) else note for note in chat.notes]
            notes += [described(description), *of_chat]
        cfg = renderer.cfg
        return Conversations(tables, seed, cfg.max_prompt_length, cfg.system), list(dict.fromkeys(notes))

    def check(self, section: str, tasks: Sequence[Task]) -> None:
        """Raise UserError if an environment cannot start with the columns of a section's rows."""
        for task in tasks if self.hosts else ():
            name = "" if "" in self.hosts else task.columns.get(SELECTED_BY)
            if name not in self.hosts:
                raise UserError(
                    f"environments: row {task.index} of {section} has {name!r} in the column {SELECTED_BY!r}, but the "
                    f"recipe's environments are {', '.join(self.hosts)}"
                )
        for name, (host, _) in self.hosts.items():
            first = next((task for task in tasks if name in ("", task.columns.get(SELECTED_BY))), None)
            if first is not None and (problem := host.problem(_columns(first))) is not None:
                noun = "agent" if host.description.kind == "agent" else "environment"
                owner = "" if problem.startswith("tools.") else f"{noun} {host.description.name!r}: "
                # training rows are checked first, so wrong parameters of an agent appear there: do not blame the rows
                where = "" if noun == "agent" and section == "data" else f"{section}: "
                raise UserError(f"{where}{owner}{problem}")

    def check_beginnings(self, talks: Conversations, tasks: Sequence[Task]) -> None:
        """Start each environment that has `reset` once, with its first row among `tasks`.

        Raises UserError if that fails, or if a row without the column `prompt` gets no prompt from `reset` either.
        """
        for name, (host, config) in self.hosts.items():
            description = host.description
            task = next((task for task in tasks if name in ("", task.columns.get(SELECTED_BY))), None)
            if task is None or not description.resets:
                continue
            which = f"environment {description.name!r}" + (f" ({config.use})" if config.use else "")
            try:
                added = talks.begin_once(task)
            except UserError as error:
                message = str(error)
                if message.startswith("tools."):  # an error of a tool's own reset
                    raise UserError(f"{message}, with row {task.index} of {task.source}") from error
                raise UserError(f"{which}: reset failed for row {task.index} of {task.source}: {message}") from error
            if not last_text(task.prompt).strip() and "prompt" not in task.columns and _is_empty(added):
                raise UserError(
                    f"data.prompt: the rows have no column 'prompt' (they have {', '.join(task.columns)}), and the "
                    f"reset of {which} returns no prompt either. Name the column that holds the prompt, or a text with "
                    'columns such as data.prompt: "{question}"; or let reset return the prompt'
                )

    def close(self) -> None:
        """End the partners' processes and close what else belongs to them."""
        self.opened.close()
        for host, _ in self.hosts.values():
            host.close()


def with_sources(talks: Conversations, readers: Mapping[str, PromptRenderer], system: str | None) -> None:
    """Start conversations as the prompts of each source start: with its limit on prompt length, and with `system`.

    `system` is the system message before all text prompts. It is None if sources differ in it: then prompts with a
    system message are messages. Raises UserError if sources use the chat template differently, because all
    conversations are rendered in the same way.
    """
    talks.system = system
    talks.limits = {name: reader.cfg.max_prompt_length for name, reader in readers.items()}
    (first, like), *others = readers.items()
    for name, reader in others:
        same = {
            "chat_template": reader.wraps_text == like.wraps_text,
            "chat_template_kwargs": reader.cfg.chat_template_kwargs == like.cfg.chat_template_kwargs,
        }
        if differ := [setting for setting, alike in same.items() if not alike]:
            raise UserError(
                f"data.sources: {first!r} and {name!r} differ in {differ[0]}, but all conversations with environments "
                f"are rendered in the same way: set it once, as data.{differ[0]}"
            )


def invite(
    conversations: Mapping[str, EnvironmentConfig],
    tools: Sequence[ToolConfig],
    given: Given,
    groups: int,
    rewards: Sequence[Path] = (),
) -> Partners:
    """Start the hosts that a recipe names, and wait for their descriptions.

    `groups` is the number of groups sampled simultaneously. `rewards` are files of rewards, which the processes may
    load. Raises UserError for environments and tools that cannot be loaded, and for settings without effect on them;
    no process is left running then.
    """
    for name, config in conversations.items():
        if config.use is not None and hasattr(given.functions.get(config.use), "rollout"):
            return _alone(name, config, conversations, tools, given)
    for name, config in conversations.items():
        if config.is_agent:
            check_endpoint(f"{place_of(name)}.{'agent' if config.agent else 'command'}")
    objects = [given.functions.get(tool.use) for tool in tools]
    workers = workers_for(groups)
    with ExitStack() as stack:
        hosts: dict[str, tuple[Host, EnvironmentConfig]] = {}
        for name, config in conversations.items():
            made = given.functions.get(config.use or config.agent or "")
            if (made or any(objects)) and (idle := sorted(config.changed & IN_PROCESSES)):
                raise UserError(
                    f"{place_of(name)}.{idle[0]} does nothing for Python objects: they live in the trainer's process"
                )
            host: Host = make_host(config, tools, bool(name), workers, made, objects, rewards)
            stack.callback(host.close)
            hosts[name] = host, config
        for name, (host, config) in hosts.items():  # a second loop, so that the hosts start in parallel
            if host.description.kind == "rollout":
                return _alone(name, config, conversations, tools, given)
            _check_terms(place_of(name), config, host.description)
        stack.pop_all()
        return Partners(hosts)


MOST_WORKERS = 8


def workers_for(groups: int) -> int:
    """The default number of a host's processes: one for each of the `groups` sampled simultaneously.

    At most `MOST_WORKERS` or the number of cores, whichever is larger. More processes lose fewer conversations when one
    dies, but each costs about 50 MB.
    """
    return max(1, min(max(os.cpu_count() or 1, MOST_WORKERS), groups))


def _alone(
    name: str,
    config: EnvironmentConfig,
    conversations: Mapping[str, EnvironmentConfig],
    tools: Sequence[ToolConfig],
    given: Given,
) -> Partners:
    """The environment that itself makes trajectories, in this process. Raises UserError for settings it ignores."""
    place, why = place_of(name), "its class makes trajectories itself (it has a method rollout)"
    if len(conversations) > 1:
        raise UserError(f"{place}: {why}, so it must be the only environment of the run")
    if tools:
        raise UserError(f"tools do nothing with {place}.use: {why}")
    if idle := sorted(config.changed - {"use", "kwargs"}):
        raise UserError(f"{place}.{idle[0]} does nothing: {why}, in the trainer's process")
    assert config.use is not None
    return Partners(own=given.environment(config.use, config.kwargs))


def _check_terms(place: str, config: EnvironmentConfig, description: Description) -> None:
    """Raise UserError for settings without effect on this kind of environment. (The schema checks those of agents.)"""
    if config.is_agent:
        return
    if description.kind not in ANSWERING and config.thinking != "keep":
        why = "does not reply as the user, and tool results leave earlier thinking in place"
        raise UserError(f"{place}.thinking: {config.thinking} does nothing: {description.name} {why}")
    idle: Collection[str] = ()
    if not description.tools:
        idle = {"max_tool_calls"} if description.kind in ANSWERING else {"max_tool_calls", "max_turns"}
        why = "offers no tools" if description.kind in ANSWERING else "offers no tools and does not reply"
    if found := sorted(config.changed & set(idle)):
        raise UserError(f"{place}.{found[0]} does nothing: {description.name} {why}")


def _anew(place: str, chat: Chat) -> Anew:
    """How conversations continue in new rows. Raises UserError if the chat template never drops thinking."""
    try:
        return chat.anew
    except UserError as error:
        raise UserError(f"{place}.thinking: {error}. Leave it at keep") from error


def described(description: Description) -> str:
    """A note for the plan: what the model can do in an environment."""
    if description.kind == "agent":
        return f"environment {description.name}: an agent; it calls the model itself and returns the reward"
    names = ", ".join(tool["function"]["name"] for tool in description.tools)
    parts = [
        f"the model calls {names}" if names else "",
        "it replies to the model" if description.kind in ANSWERING else "",
    ]
    rewards = "it rewards a conversation at its end (get_reward)" if description.rewards else ""
    withheld = (
        f"{', '.join(description.withheld)} {'is' if len(description.withheld) == 1 else 'are'} not offered to the "
        "model, because the environment has step(text): step(message) offers tools too"
        if description.withheld
        else ""
    )
    return f"environment {description.name}: {'; '.join(filter(None, [*parts, rewards, withheld])) or 'a single turn'}"


def _is_empty(added: Content | None) -> bool:
    return not (added.strip() if isinstance(added, str) else added)


def place_of(name: str) -> str:
    """The recipe section of the environment with this name."""
    return f"environments.{name}" if name else "environment"


def _columns(task: Task) -> list[str]:
    return list(dict.fromkeys(["prompt", *task.columns]))
