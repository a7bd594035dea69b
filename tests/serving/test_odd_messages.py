"""Messages, tools and template settings of any shape that JSON has: each is answered or refused, for every family."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from environments.families import FAMILIES, tokenizer_of
from test_what_turns_say import CALLS

from grpo.serving.refusals import Refusal
from grpo.serving.sessions import SessionMemory
from grpo.serving.speaker import Speaker
from grpo.serving.wire import ChatRequest, read

VALUES: list[Any] = [None, True, 0, -1.5, "", "x", [], [1], {}, {"a": 1}]
SCHEMAS: list[Any] = [
    *VALUES,
    *({"properties": properties} for properties in ([1], "x", {"a": 3}, {"a": True}, {"a": {"type": [{}]}})),
    *({"properties": {"a": {"type": kind}}} for kind in ("string", ["integer", "null"], {"b": 1}, 3, "odd")),
    *({"properties": {"a": {"enum": given}}, "required": 3} for given in ([], 3, ["b"], {"c": 1})),
]
ROLES = ("user", "assistant", "tool", "system", "developer")


def message(draw: random.Random) -> dict[str, Any]:
    arguments = draw.choice(['{"a": 1}', "[", "null", *VALUES])
    call = {"function": {"name": "weather", "arguments": arguments}, "id": draw.choice(VALUES)}
    told = {
        "role": draw.choice(ROLES),
        "content": draw.choice(["Hello", "Hello", [{"type": "text", "text": "x"}], *VALUES]),
        "name": draw.choice([None, None, "n"]),
        "tool_calls": draw.choice([None, [], [call], [call, call], 3]),
        "tool_call_id": draw.choice([None, *VALUES]),
        "reasoning_content": draw.choice([None, None, *VALUES]),
    }
    return {key: value for key, value in told.items() if value is not None or draw.random() < 0.3}


def body(draw: random.Random) -> dict[str, Any]:
    function = {"name": draw.choice(["weather", "now"]), "description": draw.choice(["Does.", *VALUES])}
    tools = [{"type": "function", "function": {**function, "parameters": draw.choice(SCHEMAS)}}]
    settings = draw.choice([None, {}, {"enable_thinking": draw.choice(VALUES)}, {"odd": draw.choice(VALUES)}])
    messages = [{"role": "user", "content": "Hello"}, *(message(draw) for _ in range(draw.randrange(3)))]
    return {"messages": messages, "chat_template_kwargs": settings, **({"tools": tools} if draw.random() < 0.7 else {})}


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_messages_and_tools_are_answered_or_refused(family: str) -> None:
    draw, tokenizer = random.Random(family), tokenizer_of(family)
    speaker, session = Speaker(tokenizer, 10**6, 4096), SessionMemory("one")
    answered = 0
    for _ in range(60):
        try:
            asked = read(ChatRequest, json.dumps(body(draw)).encode())
            voice = speaker.voice([tool.model_dump() for tool in asked.tools or ()], asked.chat_template_kwargs)
            speaker.prompt_of(voice, asked.messages, session)
        except Refusal:
            continue
        answered += 1
        said = CALLS.get(family, "Yes.").replace("city", "a")
        voice.chat.parse(tokenizer.encode(said, add_special_tokens=False))
    assert answered > 5 or family in ("plain", "gemma")
