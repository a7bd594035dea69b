"""Turns messages into tokens with the model's chat template, for dataset prompts and conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo.types import Message

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper

Schema = Mapping[str, Any]
"""A tool in the format of chat templates: `{"type": "function", "function": {"name", "description", "parameters"}}`."""


def rendered_ids(
    tokenizer: TokenizerWrapper, messages: Sequence[Message], tools: Sequence[Schema], kwargs: Mapping[str, Any]
) -> list[int]:
    """The token ids of a prompt: all messages, the tools, and the beginning of the model's answer.

    If the last message is the assistant's, the answer continues it. `kwargs` are passed to the template. Errors of the
    template, which is the model's code, are not caught.
    """
    continued = messages[-1]["role"] == "assistant"
    how = {"continue_final_message": True} if continued else {"add_generation_prompt": True}
    return list(tokenizer.apply_chat_template(list(messages), **shown(tools), **how, **kwargs))


def rendered_text(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Message],
    tools: Sequence[Schema],
    kwargs: Mapping[str, Any],
    generation: bool,
) -> str:
    """The prompt as text. With `generation`, it ends with the beginning of the model's answer."""
    how = {"add_generation_prompt": generation, "tokenize": False}
    return str(tokenizer.apply_chat_template(list(messages), **shown(tools), **how, **kwargs))


def shown(tools: Sequence[Schema]) -> dict[str, Any]:
    """The template's keyword argument for tools; empty without tools."""
    return {"tools": [dict(tool) for tool in tools]} if tools else {}
