"""The `kwargs` of the reward `use: judge`: the question about a completion, and the scores of its answers."""

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
    """The judge's question: a template over `{prompt}`, `{completion}` and the dataset's columns."""
    system: str | None = None
    """A system message before the judge's prompt."""
    labels: Annotated[dict[str, Annotated[float, Field(ge=-LARGE, le=LARGE)]], Field(min_length=2)] = {
        "Yes": 1.0,
        "No": 0.0,
    }
    """The expected answers, and the score of each. A completion's score is the mean of these scores, weighted by the
    probability that the judge gives to the first token of each answer. With Yes and No it is p(Yes) / (p(Yes) + p(No)),
    as generative verifiers compute it (arXiv 2408.15240). With ratings it is the expected rating (G-Eval, arXiv
    2303.16634)."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments for the chat template. A model that thinks before it answers needs `{enable_thinking: false}`, or its
    template's own name for this argument, because grpo reads the answer from the first token."""
    max_length: Tokens | None = None
    """Maximum number of tokens that the judge reads. A longer text is not truncated: it gets no score, which counts as
    a failure. Default: the number of positions that the model has."""
    batch_tokens: Tokens = 4096
    """Tokens in one batch, padding included. A longer text goes through the model alone."""

    @property
    def columns(self) -> list[str]:
        """The names in the template."""
        return [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name is not None]

    @model_validator(mode="after")
    def _labels_are_texts(self) -> JudgeConfig:
        if odd := sorted({"true", "false", "null"} & self.labels.keys()):
            raise ValueError(
                f"labels has {odd[0]}: YAML reads Yes, No, On and Off without quotes as true and false. "
                'Write labels: {"Yes": 1, "No": 0}'
            )
        return self

    @model_validator(mode="after")
    def _a_template(self) -> JudgeConfig:
        try:
            fields = list(string.Formatter().parse(self.prompt))
        except ValueError as error:
            raise ValueError(f"prompt is not a valid template: {error}; write {{{{ for a literal {{") from None
        odd = [name for _, name, spec, how in fields if name is not None and (not name.isidentifier() or spec or how)]
        if odd:
            raise ValueError(
                f"prompt may contain only plain names, {{like_this}}, and {{{odd[0]}}} is not a plain name; write "
                "{{ for a literal {"
            )
        if "completion" not in self.columns:
            raise ValueError("prompt does not contain {completion}, so the judge would not see the answer: add it")
        return self


def judge_of(kwargs: Mapping[str, Any]) -> JudgeConfig:
    """A judge's settings. Raises ValueError for an unknown setting, and for an invalid value."""
    return settings_of(JudgeConfig, kwargs, "A judge")
