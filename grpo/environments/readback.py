"""Tests a chat template's tool calls: it must show the tools to the model, and grpo must parse the calls it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from grpo.environments.joints import WAYS_OUT
from grpo.environments.template import QUESTION, Template, shared
from grpo.environments.thinking import Thinking
from grpo.environments.toolcalls import FORMATS, HARMONY, CallFormat, ParsedTurn, between
from grpo.errors import UserError
from grpo.types import Message


def format_of(template: Template, thinking: Thinking | None, instead: str = "") -> CallFormat | None:
    """Return the first format that reads back the tool calls that the template writes.

    Without tools, this is the gpt-oss format if the tokenizer has channels, or else None. Raises UserError if the
    template does not show the tools, or if no format reads its calls. `instead` is an alternative for the first error.
    """
    inferred = _of_mlx_lm(template)
    if not template.tools:
        return HARMONY if {"<|channel|>", "<|message|>"} <= set(template.special) else None
    _check_tools_shown(template, instead)
    examples = [_example(tool) for tool in template.tools]
    others = [replace(template, tools=(tool,)) for tool in template.tools[1:]]  # rendering all tools took seconds
    shown = [template, *others]
    for one in [*inferred, *FORMATS]:
        if all(_reads_back(own, one, thinking, [call]) for own, call in zip(shown, examples, strict=True)):
            return one
    if inferred and not _writes(template, examples[0]):
        return replace(inferred[0], name=f"{inferred[0].name}, untested since the chat template writes none")
    raise UserError(
        "no known format reads back the tool calls that the model's chat template writes, "
        f"{_written(template, examples[:1])[0]!r:.200}: {WAYS_OUT}"
    )


def takes_several(template: Template, form: CallFormat, thinking: Thinking | None) -> bool:
    """Whether the template writes, and the format reads back, two calls in a turn. True if it writes no calls."""
    calls = [_example(tool) for tool in (template.tools[0], template.tools[-1])]
    if not _writes(template, calls[0]):
        return True
    return template.takes(_calling(calls)) and _reads_back(template, form, thinking, calls)


def _of_mlx_lm(template: Template) -> list[CallFormat]:
    tokenizer = template.tokenizer
    if not tokenizer.has_tool_calling:
        return []
    start, end, parse = tokenizer.tool_call_start, tokenizer.tool_call_end, tokenizer.tool_parser
    return [between(f"mlx-lm's for {start}", start, end or "", lambda text, tools: parse(text, list(tools)))]


def _check_tools_shown(template: Template, instead: str) -> None:
    text = template.render([QUESTION], generation=True)
    if hidden := [name for name in (tool["function"]["name"] for tool in template.tools) if name not in text]:
        raise UserError(
            f"the model's chat template does not show tools to the model: {hidden[0]!r} is not in its prompt. Use a "
            f"model whose template does (such as Qwen2.5, Qwen3, Llama 3.1, GLM-4.5, or gpt-oss){instead}"
        )


def _calling(calls: Sequence[dict[str, Any]]) -> list[Message]:
    given = [{"id": f"call{i:05d}", "type": "function", "function": call} for i, call in enumerate(calls)]
    return [QUESTION, {"role": "assistant", "content": "", "tool_calls": given}]


def _written(template: Template, calls: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Return the turn with these calls as the template writes it, and the text before the turn."""
    prompt = template.encode(template.render([QUESTION], generation=True))
    whole = template.encode(template.render(_calling(calls), generation=False))
    begin = len(shared(prompt, whole))  # compare tokens, because two marks may begin with the same letters
    end = next((i for i in range(begin, len(whole)) if whole[i] in template.stop_ids), len(whole))
    return template.decode(whole[begin:end]), template.decode(whole[:begin])


def _writes(template: Template, call: dict[str, Any]) -> bool:
    """Whether the template writes calls. LFM2's template does not: it expects calls in the turn's text."""
    return call["name"] in _written(template, [call])[0]


def _reads_back(
    template: Template, form: CallFormat, thinking: Thinking | None, calls: Sequence[dict[str, Any]]
) -> bool:
    turn, lead = _written(template, calls)
    if thinking is not None:
        _, turn = thinking.after(lead).split(turn)
    read: ParsedTurn = form.read(turn, template.tools)
    return [{"name": call["name"], "arguments": call["arguments"]} for call in read.calls] == list(calls)


EXAMPLES: dict[str, Any] = {
    "string": 'naïve "x" {y}',
    "integer": 3,
    "number": 0.5,
    "boolean": True,
    "array": [1, 2],
    "object": {"a": 1},
}


def _example(tool: Any) -> dict[str, Any]:
    """Return an example call of a tool, with an argument for each parameter."""
    function = tool["function"]
    properties = (function.get("parameters") or {}).get("properties")
    arguments = {name: _value(schema) for name, schema in properties.items()} if isinstance(properties, Mapping) else {}
    return {"name": function["name"], "arguments": arguments}


def _value(schema: Any) -> Any:
    """Return a value that fits a schema; a string if the schema, which may come from a client, has no type."""
    if not isinstance(schema, Mapping):
        return "x"
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    return EXAMPLES.get(kind, "x") if isinstance(kind, str) else "x"
