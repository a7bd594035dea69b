"""A host as a recipe has it: in worker processes, or in this one for what was given from Python as objects."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from grpo.config.environment import EnvironmentConfig, ToolConfig
from grpo.environments.agent import AgentAt, FunctionAgent
from grpo.environments.home import Home
from grpo.environments.host import EnvironmentHost, HostTerms
from grpo.environments.inline import InlineHome
from grpo.environments.process import ProcessHome, ProcessTerms
from grpo.environments.program import ProgramAt
from grpo.environments.seats import ConversationLimits
from grpo.environments.toolbox import Maker, Makers
from grpo.errors import UserError
from grpo.plugins import Function, Located, locate_tool
from grpo.processes.output import Output
from grpo.processes.sandbox.worker import Sandbox
from grpo.processes.variables import environment, named_variables, with_hint

Named = tuple[Located, Mapping[str, Any]]
"""Where a class or function is, and the recipe's arguments for it."""
ALONE = "tools"
"""The name of a host with tools alone."""
LATE = " (environment.rollout_timeout)"
BLOCKED = f"{LATE}; one that is async and blocks (time.sleep, a client that is not async) holds up its whole process"
"""What to say of agents that take too long: of programs, and of functions, many of which share a process."""


def make_host(
    config: EnvironmentConfig,
    tools: Sequence[ToolConfig] = (),
    several: bool = False,
    workers: int = 1,
    given: Function | None = None,
    functions: Sequence[Function | None] = (),
    rewards: Sequence[Path] = (),
) -> EnvironmentHost:
    """The host of an environment and the tools beside it; its processes are started, and not waited for.

    `several`: the dataset's column `environment` chooses among several of them. `workers` is how many processes there
    are if `config` does not say. `given` is the environment's class or function and `functions` those of the tools, if
    they were given as objects (None: the recipe names it): then all live in this process. `rewards` are files that the
    sandbox shows, too. Raises UserError for names that mean nothing, for variables in `env` that are not set, and where
    there is no sandbox for `config.sandbox`.
    """
    located = _located(config)
    what = ALONE if located is None else f"{located.what} {located.name!r}"
    seconds = [tool.timeout for tool in tools]
    timeout = config.agent_seconds if config.is_agent else config.timeout
    late = LATE if config.command else BLOCKED if config.agent else ""
    terms = HostTerms(
        what, timeout, config.reset_timeout, seconds, config.workers or workers, several, config.is_agent, late
    )
    if given is None and not any(functions):
        named = [(locate_tool(tool.use), tool.kwargs) for tool in tools]
        return _in_processes(config, terms, None if located is None else (located, config.kwargs), named, rewards)
    if config.sandbox:
        raise UserError(
            f"{what}: sandbox: objects given from Python live in this process. Name all in files or modules"
        )
    objects = [*functions, *[None] * (len(tools) - len(functions))]
    makers = [
        _maker(one or locate_tool(tool.use).load(), tool.kwargs) for tool, one in zip(tools, objects, strict=True)
    ]
    made = None if located is None else _maker(given or located.load(), config.kwargs)
    if made is not None and config.is_agent:
        made = replace(made, make=partial(FunctionAgent, made.make))
    name = config.called if config.is_agent else config.name
    return EnvironmentHost(lambda _: InlineHome(Makers(made, makers), name), replace(terms, workers=1))


def limits_of(config: EnvironmentConfig) -> ConversationLimits:
    """What ends a conversation early, by the recipe."""
    return ConversationLimits(config.max_turns, config.max_tool_calls, config.max_turn_tokens, config.rollout_timeout)


def _located(config: EnvironmentConfig) -> Located | None:
    """What the section names. A command is in no file of Python's."""
    if config.what is None:
        return None
    return Located(config.called, config.use or config.agent or "", "agent" if config.is_agent else "environment")


def _loadable(config: EnvironmentConfig, located: Located) -> Located | AgentAt | ProgramAt:
    """What makes, where it is loaded, the object that a process has for a conversation."""
    if config.command is not None:
        return ProgramAt(config.command)
    return AgentAt(located.absolute()) if config.agent is not None else located.absolute()


def _maker(function: Function, kwargs: Mapping[str, Any]) -> Maker:
    return Maker(function, kwargs, getattr(function, "__name__", "tool"))


def _in_processes(
    config: EnvironmentConfig, terms: HostTerms, made: Named | None, tools: Sequence[Named], rewards: Sequence[Path]
) -> EnvironmentHost:
    named = [*([made] if made else []), *tools]
    variables = _variables(terms.what, config.env, named)
    if config.is_agent:
        variables |= _without_proxy(variables)
    sandbox = None
    if config.sandbox:
        sandbox = Sandbox.of(terms.what, [Path(located.file) for located, _ in named if located.file], rewards)
    setup = {
        "path": [os.path.abspath(entry) for entry in sys.path],  # the sandbox has a working directory of its own
        "name": config.called if config.is_agent else config.name,
        "environment": made and (_loadable(config, made[0]), made[1]),
        "tools": [(located.absolute(), kwargs) for located, kwargs in tools],
    }
    output = Output(made[0].name if made else ALONE)

    def make_home(describes: bool) -> Home:
        first = pickle.dumps({**setup, "describes": describes})
        return ProcessHome(ProcessTerms(first, variables, config.memory_gb, sandbox, config.is_agent), output)

    terms = replace(terms, explain=partial(with_hint, environment=variables))
    return EnvironmentHost(make_home, terms, output)


def _without_proxy(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables by which HTTP clients ask this machine itself without the proxy that others may have to go through."""
    return {
        name: ",".join(filter(None, [variables.get(name, ""), "127.0.0.1", "localhost"]))
        for name in ("NO_PROXY", "no_proxy")
    }


def _variables(what: str, env: Sequence[str], named: Sequence[Named]) -> dict[str, str]:
    """The variables of the processes. Sets have the same order in all of them, or a resumed run would be another."""
    try:
        seen = {name for located, kwargs in named for name in named_variables(env, located.where, kwargs)}
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    return {"PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"), **environment(seen)}
