"""The sections `environment`, `environments` and `tools`: what the model talks to, and what it may call."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator

from grpo.config.rewards import DAY
from grpo.config.section import LARGE, Above0, Fraction, Name, Positive, Section, Tokens
from grpo.plugins import SESSION

Seconds = Annotated[float, Field(ge=0.01, le=DAY)]
AGENT_SECONDS = 3600.0
"""Default `rollout_timeout` of agents: an agent that hangs must not block a run forever."""
IDLE_WITH_AGENTS: Mapping[str, str] = {
    "max_tool_calls": "an agent runs its tools itself",
    "timeout": "an agent is called once, and rollout_timeout limits this call",
    "reset_timeout": "an agent has no reset",
    "sandbox": "the sandbox has no network, so an agent could not reach the model",
}
"""Settings of `environment` that do nothing with an agent, and why."""


def looks_like_file(word: str) -> bool:
    """Whether a word of a command looks like a file name (`agent.py`, `bin/agent`), rather than an option."""
    return not word.startswith("-") and bool("/" in word or Path(word).suffix)


class EnvironmentConfig(Section):
    use: Name | None = None
    """A class, or a function that constructs an object, like TRL's `environment_factory`: `file.py:Class`, `file.py`
    (if it has one class) or `package.module:Class`. Default: none; the settings below then apply only to `tools`."""
    agent: Name | None = None
    """Instead of `use`: a program that calls the model itself, through an OpenAI-compatible endpoint. Write
    `file.py:function` or `package.module:function`, for an `async def run(data, base_url, api_key, **columns)`. The
    function returns the reward: a number, a dict with `reward` and metrics, or None. It needs the extra `serve`."""
    command: tuple[str, ...] | None = None
    """Instead of `agent`: a program in any language, such as `[python, agent.py]`. grpo starts the program for each
    completion. The program finds the endpoint in OPENAI_BASE_URL and OPENAI_API_KEY, reads the row as JSON from
    standard input, and writes the reward as its last line: a number, or a JSON object with `reward` and metrics. It
    needs the extra `serve`."""
    name: str | None = None
    """Name of the environment's reward and metrics. Default: the name of the class. For an agent, the name of its
    function, or of the file or module if the function is `run`. For a command, the name of its file."""
    kwargs: dict[str, Any] = {}
    """Arguments for the class or function. An agent gets them in each call."""
    weight: Annotated[float, Field(ge=-LARGE, le=LARGE)] = 1.0
    """Weight of the environment's own reward: the rewards of its steps, and the value that `get_reward` returns. 0
    makes it a metric only."""
    max_turns: Positive | None = None
    """Maximum number of the model's turns in a conversation. For an agent, the maximum number of its requests. Default:
    no limit."""
    max_tool_calls: Positive | None = None
    """Maximum number of tool calls in a conversation. Default: no limit."""
    max_turn_tokens: Tokens | None = None
    """Maximum number of tokens in one turn of the model. Default: what is left of `rollout.max_completion_length`."""
    thinking: Literal["keep", "drop"] = "keep"
    """What happens to earlier thinking when the environment answers as the user and the model's chat template then
    removes the thinking. `keep`: the thinking stays as it was sampled, and the conversation is one row to train on.
    `drop`: the model no longer sees the thinking, as when the template is used alone. The conversation continues in a
    new row to train on, with the same advantage, and the tokens that the new row repeats are not trained. Tool results
    never change thinking. Default for agents: `drop`, as at any endpoint. With `keep`, thinking that an agent does not
    send back stays where it was sampled."""
    rollout_timeout: Seconds | None = None
    """Maximum number of seconds for a conversation, which then ends with what it has. Default: no limit. An agent that
    exceeds the limit is stopped and counts as failed, because it returned no reward. Default for agents: an hour."""
    timeout: Seconds = 30.0
    """Maximum number of seconds for one method call. If a call takes longer, its conversation fails."""
    reset_timeout: Seconds = 60.0
    """Maximum number of seconds for `reset`, including the construction of the object."""
    workers: Positive | None = None
    """Number of processes that run environments, many environments in each. The environments of a group share a
    process. If a process dies, its conversations fail. Default: one process for each group of a step, up to 8 processes
    or the number of processor cores, whichever is larger."""
    sandbox: bool = False
    """Run these processes in the sandbox: without network, and without files other than those that they need to read.
    Only on Linux."""
    env: tuple[str, ...] = ()
    """Environment variables with secrets that the environment needs. Its processes see no other variables that look
    like secrets."""
    memory_gb: Above0 | None = None
    """Memory limit in GiB for each of these processes, together with all processes that it starts. Above the limit they
    are killed. Default: no limit."""
    max_failure_rate: Fraction = 0.5
    """Stop the run when the environment failed in more than this fraction of the conversations of its last three steps.
    1: never."""

    @model_validator(mode="before")
    @classmethod
    def _as_agents_have_it(cls, given: Any) -> Any:
        """Set the default of `thinking` for agents, which differs from the default for environments."""
        if not isinstance(given, dict):
            return given
        lists = {name: tuple(given[name]) for name in ("env", "command") if isinstance(given.get(name), list)}
        default = {"thinking": "drop"} if given.get("agent") or given.get("command") else {}
        return {**default, **given, **lists}  # pydantic no longer sees JSON here, so lists must become tuples

    @model_validator(mode="after")
    def _has_what_it_is_for(self) -> EnvironmentConfig:
        named = [name for name in ("use", "agent", "command") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} each name an environment: leave out all but one")
        if self.command is not None and not (self.command and self.command[0]):
            raise ValueError("command: name a program, such as command: [python, agent.py]")
        if self.kwargs and self.command:
            raise ValueError("kwargs does nothing with command: write the arguments into the command")
        if self.kwargs and not named:
            raise ValueError("kwargs does nothing without use: for arguments of a tool, set tools.N.kwargs")
        if self.is_agent and (idle := [name for name in IDLE_WITH_AGENTS if name in self.changed]):
            raise ValueError(f"{idle[0]} does nothing with {named[0]}: {IDLE_WITH_AGENTS[idle[0]]}")
        return self

    @property
    def is_agent(self) -> bool:
        """Whether the section names an agent, which calls the model through the endpoint."""
        return self.agent is not None or self.command is not None

    @property
    def what(self) -> str | None:
        """The class, function or command that the section names; None if the section is only about `tools`."""
        return shlex.join(self.command) if self.command else self.use or self.agent

    @property
    def code(self) -> list[str]:
        """The code that the section names, in the forms of `use`; for a command, the words that look like files."""
        return [*filter(None, [self.use, self.agent]), *filter(looks_like_file, self.command or ())]

    @property
    def called(self) -> str:
        """The environment's name, or what is known of it before its code is loaded."""
        if self.name is not None:
            return self.name
        if self.command:
            return Path([*filter(looks_like_file, self.command[1:]), self.command[0]][0]).stem
        place, _, function = (self.use or self.agent or "").rpartition(":")
        if not place or (self.agent and function == "run" and place != SESSION):
            place = place or function
            return Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
        return function

    @property
    def most_seconds(self) -> float:
        """Maximum number of seconds of a conversation; 0 without a limit."""
        return self.agent_seconds if self.is_agent else self.rollout_timeout or 0.0

    @property
    def agent_seconds(self) -> float:
        """Maximum number of seconds of an agent's call."""
        return AGENT_SECONDS if self.rollout_timeout is None else self.rollout_timeout


class ToolConfig(Section):
    use: Name
    """A bundled tool (`calculator`, `python`), or a function or class, `file.py:name` or `package.module:name`. From a
    class, each conversation gets its own object. The object's public methods are tools, except `reset`, which starts a
    conversation, and `close`, which ends a conversation."""
    kwargs: dict[str, Any] = {}
    """Arguments that the model does not see. A class gets them when grpo constructs the object, a function in each
    call."""
    timeout: Seconds = 30.0
    """Maximum number of seconds for one call. If a call takes longer, its conversation fails."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """Read `tools: [calculator]` as `tools: [{use: calculator}]`."""
        return {"use": given} if isinstance(given, str) else given


class OrUse:
    """JSON Schema for editors: an entry may be a text, which is the section's `use`."""

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core)]}


ToolEntry = Annotated[ToolConfig, OrUse()]
"""An item of `tools`."""
