"""The sections `environment`, `environments` and `tools`: whom the model talks to, and what it may call."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator

from grpo.config.rewards import DAY
from grpo.config.section import LARGE, Above0, Fraction, Name, Positive, Section, Tokens

Seconds = Annotated[float, Field(ge=0.01, le=DAY)]


class EnvironmentConfig(Section):
    use: Name | None = None
    """A class, or a function that makes an object, as TRL's `environment_factory`: `file.py:Class`,
    `file.py` (of one class) or `package.module:Class`. Default: none; the settings below then hold for `tools`
    alone."""
    name: str | None = None
    """What its reward and its metrics go by. Default: the class's name."""
    kwargs: dict[str, Any] = {}
    """Arguments for the class or function."""
    weight: Annotated[float, Field(ge=-LARGE, le=LARGE)] = 1.0
    """Weight of its own reward: the rewards of its steps, and what `get_reward` returns. 0 makes it a metric only."""
    max_turns: Positive | None = None
    """Turns of the model in a conversation. Default: no limit."""
    max_tool_calls: Positive | None = None
    """Tool calls in a conversation. Default: no limit."""
    max_turn_tokens: Tokens | None = None
    """Tokens of one turn of the model. Default: what is left of `rollout.max_completion_length`."""
    thinking: Literal["keep", "drop"] = "keep"
    """What happens to earlier thinking when the environment answers as the user, with a model whose chat template then
    leaves it out. `keep`: it stays, as it was sampled, and a conversation is one row to train on. `drop`: the model
    does not see it any more, as where the template is used alone, and the conversation goes on in a new row to train
    on, with the same advantage; what that row reads again is not trained. Results of tools change no thinking."""
    rollout_timeout: Seconds | None = None
    """Seconds that a conversation may take. It then ends with what it has. Default: no limit."""
    timeout: Seconds = 30.0
    """Seconds that one call of a method may take. A conversation whose call takes longer fails."""
    reset_timeout: Seconds = 60.0
    """Seconds that `reset` may take, the making of the object included."""
    workers: Positive | None = None
    """Processes in which environments live, many in each; a group's share one. A process that dies takes its
    conversations along. Default: one for each group of a step, up to 8, or to as many as there are processor cores."""
    sandbox: bool = False
    """Put the processes into the sandbox: no network, no files but those that they need to read. On Linux."""
    env: tuple[str, ...] = ()
    """Environment variables with secrets that it needs. Its processes see no others that look like secrets."""
    memory_gb: Above0 | None = None
    """Memory in GiB that each of its processes may hold, with all processes that it starts. Above that they are killed.
    Default: no limit."""
    max_failure_rate: Fraction = 0.5
    """Stop the run when it failed in more than this fraction of the conversations of its last three steps. 1: never."""

    @model_validator(mode="after")
    def _has_what_it_is_for(self) -> EnvironmentConfig:
        if self.use is None and self.kwargs:
            raise ValueError("kwargs does nothing without use: a tool has its own, tools.N.kwargs")
        return self


class ToolConfig(Section):
    use: Name
    """A bundled name (`calculator`, `python`), or a function or class, `file.py:name` or `package.module:name`. Of a
    class each conversation has an object of its own, and the public methods are tools, but for `reset`, which begins a
    conversation, and `close`, which ends it."""
    kwargs: dict[str, Any] = {}
    """Arguments that the model does not see: of a class for making the object, of a function for each call."""
    timeout: Seconds = 30.0
    """Seconds that one call may take. A conversation whose call takes longer fails."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """`tools: [calculator]` is `tools: [{use: calculator}]`."""
        return {"use": given} if isinstance(given, str) else given


class OrUse:
    """For editors: a text is a section with this text as its `use`."""

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core)]}


ToolEntry = Annotated[ToolConfig, OrUse()]
"""An item of `tools`."""
