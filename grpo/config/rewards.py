"""One entry of `rewards`: a function or a model that grades completions, and how it runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo.config.judge import judge_of
from grpo.config.rewardmodel import reward_model_of
from grpo.config.section import LARGE, Above0, Fraction, Name, Section
from grpo.plugins import JUDGE, MODEL, model_in

DAY = 86_400
"""The seconds of a day."""


OF_FUNCTIONS = {"completions", "isolation", "timeout", "env", "memory_gb", "calls"}
"""Settings that apply only to reward functions."""


class RewardConfig(Section):
    use: Name
    """What grades completions: a bundled name, the name of an installed package's entry point (group `grpo.rewards`),
    `file.py:function`, `file.py` (its function `reward`), `package.module:function`, or a reward model: `model:` and a
    Hub repository or a folder with a sequence classifier with one label. `judge`: the model itself, as it was when the
    run began."""
    weight: Annotated[float, Field(ge=-LARGE, le=LARGE)] = 1.0
    """Weight in the sum of rewards. 0 makes the reward a metric only."""
    name: str | None = None
    """Name of the reward in metrics. Default: the name of the function, or of its file if the function is called
    `reward`."""
    kwargs: dict[str, Any] = {}
    """Arguments for the function. If `use` names a class, or a function that takes no completions, the arguments are
    for making the reward. A reward model takes `revision`, `dtype`, `quantize`, `max_length`, `batch_tokens` and
    `sigmoid`. The judge takes `prompt`, `system`, `labels`, `chat_template_kwargs`, `max_length` and `batch_tokens`."""
    completions: Literal["text", "messages"] | None = None
    """The form in which the function reads completions and prompts: texts, or lists of chat messages. Default: the form
    in its annotations (`list[str]`, `list[list[dict]]`), or else the form of the dataset. A function that then fails at
    `completion[0]["content"]` gets messages. A conversation with tools or an environment has the form of messages; its
    text is what the model said in it."""
    isolation: Literal["process", "inline"] = "process"
    """`process`: the function runs in its own worker process. `inline`: it runs in the trainer's process, for cheap
    functions that you trust. Nothing then protects the run from the function, and no time limit applies."""
    timeout: Annotated[float, Field(ge=0.01, le=DAY)] = 30.0
    """Maximum number of seconds for one call. If a call takes longer, its process is killed and replaced, and its
    completions have no score."""
    env: tuple[str, ...] = ()
    """Environment variables with secrets that the function needs, such as `[OPENAI_API_KEY]`. The function's process
    inherits all other variables, except variables that look like secrets (`*_KEY`, `*_TOKEN`, `*SECRET*`, `*PASSWORD*`,
    `AWS_*`, …) and are not named here or by an argument such as `api_key_env`."""
    memory_gb: Above0 | None = None
    """Memory limit in GiB for the function's process, together with all processes that it starts. Above the limit they
    are killed: the call has failed, and a new process takes the next call. Default: no limit."""
    calls: Literal["step", "group", "completion"] | None = None
    """What one call gets: all completions of a step, all completions of a prompt (group), or one completion. If a call
    fails, all its completions have no score. With `group` and `completion`, a prompt's completions are scored while
    others are still sampled, unless `isolation` is `inline`. Default: the value of `CALLS` in the function's file, or
    else `step`. For a function that takes `environments`, the default is `group`."""
    max_failure_rate: Fraction = 0.5
    """Stop the run when the reward failed on more than this fraction of the completions of its last three scorings. 1:
    never. A reward of weight 0 never stops a run."""

    @property
    def model(self) -> str:
        """The name of the reward model; "" if a function grades."""
        return model_in(self.use)

    @property
    def judges(self) -> bool:
        """Whether the judge grades: the model in training, as it was at the start of the run."""
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
                    f"{min(unread)} does nothing for {what}, which scores a whole step in the trainer's own process"
                )
        if self.isolation == "inline" and (unread := self.changed & {"timeout", "env", "memory_gb"}):
            raise ValueError(f"{min(unread)} does nothing with isolation: inline, in the trainer's own process")
        if self.weight == 0 and "max_failure_rate" in self.changed:
            raise ValueError("max_failure_rate does nothing with weight 0: the policy does not learn from this reward")
        return self
