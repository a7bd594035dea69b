"""Creates a recipe's host: in worker processes, or in this process for objects that were passed from Python."""

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
"""The place of a class or function, and the recipe's arguments for it."""
ALONE = "tools"
"""The name of a host that has only tools."""
LATE = " (environment.rollout_timeout)"
BLOCKED = f"{LATE}; an async agent that blocks (time.sleep, a client that is not async) blocks its whole process"
"""What to add to the timeout error of an agent: `LATE` for programs, `BLOCKED` for functions, which share a process."""


def make_host(
    config: EnvironmentConfig,
    tools: Sequence[ToolConfig] = (),
    several: bool = False,
    workers: int = 1,
    given: Function | None = None,
    functions: Sequence[Function | None] = (),
    rewards: Sequence[Path] = (),
) -> EnvironmentHost:
    """Create the host of an environment and its tools. The host starts its processes, and does not wait for them.

    `several`: the dataset's column `environment` selects among several environments. `workers` is the number of
    processes if `config` does not set it. `given` is the class or function of the environment, and `functions` those of
    the tools, if they were passed as objects (None: the recipe names it); then all of them live in this process.
    `rewards` are further files that the sandbox can read. Raises UserError for names that cannot be found, for
    variables in `env` that are not set, and if `config.sandbox` is set but there is no sandbox.
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
            f"{what}: objects passed from Python live in this process and cannot be sandboxed: with sandbox, name the "
            "environment and all tools by file or module"
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
    """Return the recipe's limits that end a conversation early."""
    return ConversationLimits(config.max_turns, config.max_tool_calls, config.max_turn_tokens, config.rollout_timeout)


def _located(config: EnvironmentConfig) -> Located | None:
    """Return the name and place of what the section names; None if it names nothing. A command's place is empty."""
    if config.what is None:
        return None
    return Located(config.called, config.use or config.agent or "", "agent" if config.is_agent else "environment")


def _loadable(config: EnvironmentConfig, located: Located) -> Located | AgentAt | ProgramAt:
    """Return the object whose `load` gives, in the worker process, the maker of a conversation's object."""
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
        "path": [os.path.abspath(entry) for entry in sys.path],  # the sandbox has its own working directory
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
    """Variables that make HTTP clients connect to this machine without a proxy."""
    return {
        name: ",".join(filter(None, [variables.get(name, ""), "127.0.0.1", "localhost"]))
        for name in ("NO_PROXY", "no_proxy")
    }


def _variables(what: str, env: Sequence[str], named: Sequence[Named]) -> dict[str, str]:
    """The environment variables of the processes. The hash seed is fixed, so that the order of sets, and with it a
    resumed run, is reproducible."""
    try:
        seen = {name for located, kwargs in named for name in named_variables(env, located.where, kwargs)}
    except UserError as error:
        raise UserError(f"{what}: {error}") from None
    return {"PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"), **environment(seen)}
