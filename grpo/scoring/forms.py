"""Completions and prompts as texts or as chat messages: each reward function gets the form that it reads.

TRL passes messages for a dataset of messages and texts for a dataset of texts. In grpo, a prompt is often a template
over columns that the chat template wraps later, and a reward should not depend on whether a model has a chat template.
So the form that a function declares comes first: by `rewards[].completions` in the recipe, by its annotations
(`completions: list[str]`, `completions: list[list[dict[str, str]]]`), or by failing because it uses a text as a list
of messages. All other functions get the form of the dataset. Worker processes import this module.

A conversation with an environment or tools is a list of messages: the assistant's, the tools' and the environment's. A
function that reads texts gets the assistant's turns, joined by line breaks (`text.said`), and the last message of the
prompt.
"""

from __future__ import annotations

import collections.abc
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from grpo.scoring.text import as_text, said

Form = Literal["text", "messages"]
ROLES = {"completions": "assistant", "prompts": "user"}
"""The columns that have a form, and the role of a text's message in each."""


def declared_form(function: Callable[..., Any], column: str) -> Form | None:
    """The form that a function's annotation of `column` declares; None without an annotation, or with another one."""
    try:
        annotation = inspect.signature(function, eval_str=True).parameters[column].annotation
    except Exception:  # no such parameter, a builtin without a signature, names that exist only for type checkers
        return None
    item = (typing.get_args(annotation) or [None])[0] if _is_sequence(annotation) else None
    if item is str:
        return "text"
    return "messages" if _is_sequence(item) or _is_message(item) else None


def expects_messages(error: BaseException) -> bool:
    """Whether a function failed on texts with an error that `completion[0]["content"]` raises on a text."""
    if type(error) is TypeError:
        return str(error).startswith("string indices must be integers")
    return type(error) is AttributeError and str(error) == "'str' object has no attribute 'get'"


class AskedForMessages(TypeError):
    """A text was used as a list of messages."""


class Probe(str):
    """A text that raises AskedForMessages when it, or one of its characters, is used as a message."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Probe:
        if isinstance(key, str):
            raise AskedForMessages
        return Probe(super().__getitem__(key))

    def __iter__(self) -> Iterator[Probe]:
        return map(Probe, super().__iter__())

    def get(self, *_: Any) -> Any:
        raise AskedForMessages


def in_form(columns: Mapping[str, Any], forms: Mapping[str, Form | None], system: str | None) -> dict[str, Any]:
    """The columns with `prompts` and `completions` in the given forms; None leaves a column as it is.

    A prompt's messages are the messages that the model got: `system` comes before a text that the chat template wraps.
    """
    made = dict(columns)
    for column, form in forms.items():
        if form == "text":
            made[column] = [(said if column == "completions" else as_text)(value) for value in columns[column]]
        elif form == "messages":
            before = system if column == "prompts" else None
            made[column] = [as_messages(value, ROLES[column], before) for value in columns[column]]
    return made


def as_messages(value: Any, role: str, system: str | None = None) -> Any:
    """Messages unchanged; a text as one message, after the system message if there is one."""
    if not isinstance(value, str):
        return value
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": role, "content": value}]


def _is_sequence(annotation: Any) -> bool:
    kind = typing.get_origin(annotation) or annotation
    return inspect.isclass(kind) and kind is not str and issubclass(kind, collections.abc.Sequence)


def _is_message(annotation: Any) -> bool:
    kind = typing.get_origin(annotation) or annotation
    return inspect.isclass(kind) and issubclass(kind, collections.abc.Mapping)
