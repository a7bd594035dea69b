"""Whom the model talks to in a run: hosts of environments and tools, or an environment that samples by itself."""

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
"""Settings of the processes in which environments live, unless they were given from Python as objects."""
ANSWERING = ("messages", "text")
"""The kinds of environments that answer as the user does."""


@dataclass(frozen=True, slots=True)
class Partners:
    """All that answer the model, described: no template and no model is needed for that.

    hosts   the host of each environment with the recipe's terms, by the value of the column `environment`; the only
            one goes by the empty name. Empty if a completion is a single answer.
    own     an environment with a method `rollout`, in the place of hosts
    opened  what else is closed with them: the endpoint of agents
    """

    hosts: Mapping[str, tuple[Host, EnvironmentConfig]] = field(default_factory=dict)
    own: Environment | None = None
    opened: ExitStack = field(default_factory=ExitStack)

    @property
    def are_agents(self) -> bool:
        """Whether they ask the model, in the place of being asked."""
        return any(config.is_agent for _, config in self.hosts.values())

    @property
    def tools(self) -> Tools:
        """The tools that prompts show."""
        tools = {name: host.description.tools for name, (host, _) in self.hosts.items()}
        return tools.get("", tools) if len(tools) < 2 else tools

    @property
    def resets(self) -> bool:
        """Whether prompts may become longer than the data says, by what `reset` adds, or because agents write them."""
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
        """What makes trajectories (None: single answers), and notes for the plan on how conversations are written.

        `task` is one of those that `renderer` makes, to see whether they are texts or messages; agents may ask for the
        model by the name `model`. Raises UserError for a chat template that cannot hold such conversations.
        """
        if not self.hosts:
            return self.own, []
        if self.are_agents:
            said = [described(host.description) for host, _ in self.hosts.values()]
            return agents_of(self.hosts, tokenizer, renderer, rollout, seed, model, self.opened), [*said, NOTE]
        templated = renderer.wraps_text or not isinstance(task.prompt, str)
        tables, notes = {}, []
        for name, (host, config) in self.hosts.items():
            told = host.description
            chat = Chat.of(
                tokenizer,
                told.tools,
                renderer.cfg.chat_template_kwargs,
                answers=told.kind in ANSWERING,
                templated=templated,
                stop_ids=rollout.stop_token_ids,
            )
            anew = _anew(place_of(name), chat) if config.thinking == "drop" else None
            tables[name] = Table(host, chat, limits_of(config), keeps_seats, anew)
            said = [DROPS if anew and note.startswith(KEEPS) else note for note in chat.notes]
            notes += [described(told), *said]
        cfg = renderer.cfg
        return Conversations(tables, seed, cfg.max_prompt_length, cfg.system), list(dict.fromkeys(notes))

    def check(self, section: str, tasks: Sequence[Task]) -> None:
        """Raise UserError if environments could not begin with the columns of a section's rows."""
        for task in tasks if self.hosts else ():
            name = "" if "" in self.hosts else task.columns.get(SELECTED_BY)
            if name not in self.hosts:
                raise UserError(
                    f"environments: row {task.index} of {section} has {name!r} in the column {SELECTED_BY!r}, and "
                    f"there is {', '.join(self.hosts)}"
                )
        for name, (host, _) in self.hosts.items():
            of_it = next((task for task in tasks if name in ("", task.columns.get(SELECTED_BY))), None)
            if of_it is not None and (problem := host.problem(_columns(of_it))) is not None:
                noun = "agent" if host.description.kind == "agent" else "environment"
                owner = "" if problem.startswith("tools.") else f"{noun} {host.description.name!r}: "
                # what an agent takes is first found out with the rows to train on, and is no fault of theirs
                where = "" if noun == "agent" and section == "data" else f"{section}: "
                raise UserError(f"{where}{owner}{problem}")

    def check_beginnings(self, talks: Conversations, tasks: Sequence[Task]) -> None:
        """Let each environment that has `reset` begin once, with the first of its rows among `tasks`.

        Raises UserError where it cannot, and where a row without the column `prompt` gets none from it either.
        """
        for name, (host, config) in self.hosts.items():
            told = host.description
            task = next((task for task in tasks if name in ("", task.columns.get(SELECTED_BY))), None)
            if task is None or not told.resets:
                continue
            which = f"environment {told.name!r}" + (f" ({config.use})" if config.use else "")
            try:
                added = talks.begin_once(task)
            except UserError as error:
                said = str(error)
                if said.startswith("tools."):  # of a tool's own reset
                    raise UserError(f"{said}, with row {task.index} of {task.source}") from error
                raise UserError(f"{which}: it cannot begin with row {task.index} of {task.source}: {said}") from error
            if not last_text(task.prompt).strip() and "prompt" not in task.columns and _is_empty(added):
                raise UserError(
                    f"data.prompt: the rows have no column 'prompt' (there is {', '.join(task.columns)}), and the "
                    f"reset of {which} returns nothing in its place, so the model would be asked nothing. Name the "
                    'column that holds the prompt, or a text with columns such as data.prompt: "{question}"; or let '
                    "reset return the prompt"
                )

    def close(self) -> None:
        """End the processes in which they live, and what else was opened for them."""
        self.opened.close()
        for host, _ in self.hosts.values():
            host.close()


def with_sources(talks: Conversations, readers: Mapping[str, PromptRenderer], system: str | None) -> None:
    """Have conversations begin as the prompts of each source do: with the `system` message that all texts have (None
    where that differs: then such prompts are messages), and with prompts as long as the source allows.

    Raises UserError where sources differ in how the chat template is used: all conversations are written in one way.
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
                f"data.sources: {first!r} and {name!r} differ in {differ[0]}, and all conversations with environments "
                f"are written in one way: set it once, as data.{differ[0]}"
            )


def invite(
    conversations: Mapping[str, EnvironmentConfig],
    tools: Sequence[ToolConfig],
    given: Given,
    groups: int,
    rewards: Sequence[Path] = (),
) -> Partners:
    """Start the hosts that a recipe names, and wait until they have said what they are.

    `groups` are sampled at once. `rewards` are files of rewards, which may be loaded into the processes. Raises
    UserError for environments and tools that cannot be had, and for settings that do nothing with them; nothing is
    left running then.
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
                    f"{place_of(name)}.{idle[0]} does nothing for objects: they live in the trainer's process"
                )
            host: Host = make_host(config, tools, bool(name), workers, made, objects, rewards)
            stack.callback(host.close)
            hosts[name] = host, config
        for name, (host, config) in hosts.items():  # they start side by side
            if host.description.kind == "rollout":
                return _alone(name, config, conversations, tools, given)
            _check_terms(place_of(name), config, host.description)
        stack.pop_all()
        return Partners(hosts)


MOST_WORKERS = 8


def workers_for(groups: int) -> int:
    """Processes of a host where the recipe does not say how many, for so many groups at once: one for each.

    No more than `MOST_WORKERS`, or than there are cores: a process that dies takes its conversations along, and costs
    some 50 MB.
    """
    return max(1, min(max(os.cpu_count() or 1, MOST_WORKERS), groups))


def _alone(
    name: str,
    config: EnvironmentConfig,
    conversations: Mapping[str, EnvironmentConfig],
    tools: Sequence[ToolConfig],
    given: Given,
) -> Partners:
    """The environment that makes trajectories by itself, in this process. Raises UserError for what it does not do."""
    place, why = place_of(name), "its class makes trajectories by itself (it has a method rollout)"
    if len(conversations) > 1:
        raise UserError(f"{place}: {why}, and then it is the only environment of a run")
    if tools:
        raise UserError(f"tools do nothing beside {place}.use: {why}")
    if idle := sorted(config.changed - {"use", "kwargs"}):
        raise UserError(f"{place}.{idle[0]} does nothing: {why}, in the trainer's process")
    assert config.use is not None
    return Partners(own=given.environment(config.use, config.kwargs))


def _check_terms(place: str, config: EnvironmentConfig, told: Description) -> None:
    """Raise UserError for settings that do nothing with such an environment; with agents the schema knows them."""
    if config.is_agent:
        return
    if told.kind not in ANSWERING and config.thinking != "keep":
        why = "does not answer as the user, and results of tools leave earlier thinking where it is"
        raise UserError(f"{place}.thinking: {config.thinking} does nothing: {told.name} {why}")
    idle: Collection[str] = ()
    if not told.tools:
        idle = {"max_tool_calls"} if told.kind in ANSWERING else {"max_tool_calls", "max_turns"}
        nothing = "nothing to call" if told.kind in ANSWERING else "nothing to call, and does not answer"
    if found := sorted(config.changed & set(idle)):
        raise UserError(f"{place}.{found[0]} does nothing: {told.name} has {nothing}")


def _anew(place: str, chat: Chat) -> Anew:
    """How conversations go on in new rows. Raises UserError where the chat template makes none."""
    try:
        return chat.anew
    except UserError as error:
        raise UserError(f"{place}.thinking: {error}. Leave it at keep") from error


def described(told: Description) -> str:
    if told.kind == "agent":
        return f"environment {told.name}: an agent; it asks the model itself, and returns the reward"
    names = ", ".join(tool["function"]["name"] for tool in told.tools)
    parts = [f"the model calls {names}" if names else "", "it answers the model" if told.kind in ANSWERING else ""]
    rewards = "it rewards a conversation at its end (get_reward)" if told.rewards else ""
    withheld = (
        f"{', '.join(told.withheld)} {'is' if len(told.withheld) == 1 else 'are'} not offered to the model beside "
        "step(text): step(message) offers tools, too"
        if told.withheld
        else ""
    )
    return f"environment {told.name}: {'; '.join(filter(None, [*parts, rewards, withheld])) or 'a single turn'}"


def _is_empty(added: Content | None) -> bool:
    return not (added.strip() if isinstance(added, str) else added)


def place_of(name: str) -> str:
    """The section of an environment, by its name."""
    return f"environments.{name}" if name else "environment"


def _columns(task: Task) -> list[str]:
    return list(dict.fromkeys(["prompt", *task.columns]))
