"""The `kwargs` of the reward `use: judge`: what the model is asked of a completion, and how its answer is read."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from grpo.config.kwargs import settings_of
from grpo.config.section import LARGE, Section, Tokens

ASKED = """Read a question and an answer to it.

Question:
{prompt}

Answer:
{completion}

Is the answer right? Reply with Yes or No."""


class JudgeConfig(Section):
    prompt: str = ASKED
    """What the judge is asked: a template over `{prompt}`, `{completion}` and the dataset's columns."""
    system: str | None = None
    """A system message before it."""
    labels: Annotated[dict[str, Annotated[float, Field(ge=-LARGE, le=LARGE)]], Field(min_length=2)] = {
        "Yes": 1.0,
        "No": 0.0,
    }
    """The answers that are expected, and what each is worth. The score is their mean, weighted by the probabilities
    that the judge gives to the first token of each. With Yes and No it is p(Yes) / (p(Yes) + p(No)), as generative
    verifiers read it (arXiv 2408.15240); with ratings it is the expected rating (G-Eval, arXiv 2303.16634)."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template. A model that thinks before it answers needs `{enable_thinking: false}`, or what
    its template calls that: the answer is read from the first token."""
    max_length: Tokens | None = None
    """Most tokens of what the judge reads. What is longer is not cut: it gets no score, which counts as a failure.
    Default: as many as the model has positions."""
    batch_tokens: Tokens = 4096
    """Tokens that go through the model at once, padding included; a longer text goes alone."""

    @property
    def columns(self) -> list[str]:
        """The names that the template holds."""
        return [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name is not None]

    @model_validator(mode="after")
    def _labels_are_texts(self) -> JudgeConfig:
        if odd := sorted({"true", "false", "null"} & self.labels.keys()):
            raise ValueError(
                f"labels has {odd[0]}: YAML reads Yes, No, On and Off as true and false where they have no quotes. "
                'Write labels: {"Yes": 1, "No": 0}'
            )
        return self

    @model_validator(mode="after")
    def _a_template(self) -> JudgeConfig:
        try:
            fields = list(string.Formatter().parse(self.prompt))
        except ValueError as error:
            raise ValueError(f"prompt is no template: {error}; write {{{{ for a brace") from None
        odd = [name for _, name, spec, how in fields if name is not None and (not name.isidentifier() or spec or how)]
        if odd:
            raise ValueError(f"prompt holds names alone, {{like_this}}, and {{{odd[0]}}} is none; {{{{ is a brace")
        if "completion" not in self.columns:
            raise ValueError("prompt does not hold {completion}, so every answer would be judged alike")
        return self


def judge_of(kwargs: Mapping[str, Any]) -> JudgeConfig:
    """A judge's settings. Raises ValueError for an unknown one, and for a value that it cannot have."""
    return settings_of(JudgeConfig, kwargs, "A judge")
