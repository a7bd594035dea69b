"""Messages become tokens by the model's chat template: dataset prompts, and conversations alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grpo.types import Message

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper

Schema = Mapping[str, Any]
"""A tool as chat templates take it: `{"type": "function", "function": {"name", "description", "parameters"}}`."""


def rendered_ids(
    tokenizer: TokenizerWrapper, messages: Sequence[Message], tools: Sequence[Schema], kwargs: Mapping[str, Any]
) -> list[int]:
    """The token ids of a prompt: all messages, the tools, and the beginning of the model's answer.

    An assistant's message at the end is that beginning. `kwargs` goes to the template. Raises whatever the template
    raises: it is the model's own code.
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
    """The same as text, ending with the beginning of an answer where `generation` is true."""
    how = {"add_generation_prompt": generation, "tokenize": False}
    return str(tokenizer.apply_chat_template(list(messages), **shown(tools), **how, **kwargs))


def shown(tools: Sequence[Schema]) -> dict[str, Any]:
    """What a template is told of tools: nothing where there are none."""
    return {"tools": [dict(tool) for tool in tools]} if tools else {}
