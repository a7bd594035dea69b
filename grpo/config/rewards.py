"""One entry of `rewards`: a function or a model that grades completions, and the terms on which it runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo.config.judge import judge_of
from grpo.config.rewardmodel import reward_model_of
from grpo.config.section import LARGE, Above0, Fraction, Name, Section
from grpo.plugins import JUDGE, MODEL, model_in

DAY = 86_400
"""Seconds."""


OF_FUNCTIONS = {"completions", "isolation", "timeout", "env", "memory_gb", "calls"}
"""The settings that only a function has."""


class RewardConfig(Section):
    use: Name
    """A bundled name, the name of an installed package's entry point (group `grpo.rewards`), `file.py:function`,
    `file.py` (its function `reward`), `package.module:function`, or a reward model: `model:` and a Hub repository or a
    folder with a sequence classifier of one label. `judge`: the model itself, as it was when the run began."""
    weight: Annotated[float, Field(ge=-LARGE, le=LARGE)] = 1.0
    """Weight in the sum of rewards. 0 makes it a metric only."""
    name: str | None = None
    """What its metrics go by. Default: the function's name, or its file's if that is `reward`."""
    kwargs: dict[str, Any] = {}
    """Arguments for the function, or for what makes it: a class, or a function that takes no completions. A reward
    model takes `revision`, `dtype`, `quantize`, `max_length`, `batch_tokens` and `sigmoid`; the judge `prompt`,
    `system`, `labels`, `chat_template_kwargs`, `max_length` and `batch_tokens`."""
    completions: Literal["text", "messages"] | None = None
    """The form of completions and prompts that the function reads: texts, or lists of chat messages. Default: what its
    annotations say (`list[str]`, `list[list[dict]]`), or else what the dataset has; a function that then fails at
    `completion[0]["content"]` gets messages. A conversation has messages; its text is what the model said in it."""
    isolation: Literal["process", "inline"] = "process"
    """`process`: a worker process of its own. `inline`: in the trainer's, for cheap ones that you trust; nothing
    protects the run from it, and no time limit holds."""
    timeout: Annotated[float, Field(ge=0.01, le=DAY)] = 30.0
    """Seconds that one call may take. Then its process is killed and replaced, and its completions have no score."""
    env: tuple[str, ...] = ()
    """Environment variables with secrets that the function needs, such as `[OPENAI_API_KEY]`. Its process inherits the
    others, but no variable that looks like a secret (`*_KEY`, `*_TOKEN`, `*SECRET*`, `*PASSWORD*`, `AWS_*`, …) unless
    named here or by an argument such as `api_key_env`."""
    memory_gb: Above0 | None = None
    """Memory in GiB that its process may hold, with all processes that it starts. Above that they are killed: the call
    has failed, and a new process takes the next. Default: no limit."""
    calls: Literal["step", "group", "completion"] | None = None
    """What one call gets: all of a step's completions, those of a prompt, or one. A failure costs all that the call
    got. With `group` and `completion` a prompt's are scored while others are still sampled, unless `isolation` is
    `inline`. Default: what the function's file says by `CALLS`, or else `step`; of a function that takes
    `environments` it is `group`."""
    max_failure_rate: Fraction = 0.5
    """Stop the run when it failed on more than this fraction of the completions of its last three scorings. 1: never.
    A reward of weight 0 never stops a run."""

    @property
    def model(self) -> str:
        """The reward model, or "" where a function grades."""
        return model_in(self.use)

    @property
    def judges(self) -> bool:
        """Whether the model that is trained grades, as it was when the run began."""
        return self.use == JUDGE

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> RewardConfig:
        if self.use == MODEL:
            raise ValueError("use: model: needs a name after it, such as model:org/name or model:./folder")
        if self.model or self.judges:
            _ = reward_model_of(self.kwargs) if self.model else judge_of(self.kwargs)
            if unread := self.changed & OF_FUNCTIONS:
                what = "a reward model" if self.model else "the judge"
                raise ValueError(
                    f"{min(unread)} does nothing for {what}, which reads a whole step in the trainer's own process"
                )
        if self.isolation == "inline" and (unread := self.changed & {"timeout", "env", "memory_gb"}):
            raise ValueError(f"{min(unread)} does nothing with isolation: inline, in the trainer's own process")
        if self.weight == 0 and "max_failure_rate" in self.changed:
            raise ValueError("max_failure_rate does nothing with weight 0: nothing is learnt from this reward")
        return self
