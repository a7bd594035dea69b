"""The test of a chat template's tool calls: it shows the tools to the model, and what it writes is read back."""

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
    """How calls are written: the first format that reads back what the template writes. None if it shows no channels
    and there are no tools.

    Raises UserError where the template does not show the tools, or no format reads its calls. `instead` is what else
    can be done where it shows none.
    """
    inferred = _of_mlx_lm(template)
    if not template.tools:
        return HARMONY if {"<|channel|>", "<|message|>"} <= set(template.special) else None
    _check_tools_shown(template, instead)
    examples = [_example(tool) for tool in template.tools]
    others = [replace(template, tools=(tool,)) for tool in template.tools[1:]]  # all of them each time took seconds
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
    """Whether two calls in a turn are written, and read back, as far as calls are."""
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
            f"the model's chat template does not tell the model of tools: {hidden[0]!r} is not in its prompt. Use a "
            f"model whose template does (Qwen2.5, Qwen3, Llama 3.1, GLM-4.5 and gpt-oss have such){instead}"
        )


def _calling(calls: Sequence[dict[str, Any]]) -> list[Message]:
    given = [{"id": f"call{i:05d}", "type": "function", "function": call} for i, call in enumerate(calls)]
    return [QUESTION, {"role": "assistant", "content": "", "tool_calls": given}]


def _written(template: Template, calls: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The turn that makes these calls as the template writes it, and what leads to it."""
    prompt = template.encode(template.render([QUESTION], generation=True))
    whole = template.encode(template.render(_calling(calls), generation=False))
    begin = len(shared(prompt, whole))  # of tokens: two marks may begin with the same letters
    end = next((i for i in range(begin, len(whole)) if whole[i] in template.stop_ids), len(whole))
    return template.decode(whole[begin:end]), template.decode(whole[:begin])


def _writes(template: Template, call: dict[str, Any]) -> bool:
    """Whether the template writes calls: LFM2's leaves them to what the model said."""
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
    """A call of a tool, with an argument of each of its parameters."""
    function = tool["function"]
    properties = (function.get("parameters") or {}).get("properties")
    arguments = {name: _value(schema) for name, schema in properties.items()} if isinstance(properties, Mapping) else {}
    return {"name": function["name"], "arguments": arguments}


def _value(schema: Any) -> Any:
    """A value of what a schema asks for; a text where the schema, which may be a client's, says nothing of a type."""
    if not isinstance(schema, Mapping):
        return "x"
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    return EXAMPLES.get(kind, "x") if isinstance(kind, str) else "x"
