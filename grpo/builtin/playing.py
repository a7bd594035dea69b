"""Conversations with a built-in task's environment, played by a script instead of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from typing import Any

from grpo.step import Step
from grpo.types import Message

Turns = Generator[str | Message, str, None]
"""A script that plays the model: it yields a text, or a message with `tool_calls`, and is sent the answer."""
Toolbox = Mapping[str, Callable[..., Any]]


def tools_of(environment: object, beside: tuple[Callable[..., Any], ...] = ()) -> Toolbox:
    """Return the tools by name, in the order of the prompt: the tools in `beside`, then the environment's methods."""
    reserved = {"reset", "get_reward"} | ({"step"} if speaks(environment) else set())
    methods = [
        getattr(environment, name)
        for name, _ in inspect.getmembers(type(environment), inspect.isfunction)
        if not name.startswith("_") and name not in reserved
    ]
    return {tool.__name__: tool for tool in (*beside, *methods)}


def speaks(environment: object) -> bool:
    """Whether an environment answers as the user, with `step(text)` or `step(message)`."""
    step = getattr(environment, "step", None)
    return callable(step) and bool({"text", "message"} & set(inspect.signature(step).parameters))


def call(tool: str, **arguments: Any) -> Message:
    """Return the model's message that calls a tool."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": tool, "arguments": arguments}}],
    }


def played(turns: Turns, environment: Any, tools: Toolbox) -> list[Message]:
    """Return the messages of a whole conversation, starting with the model's first message.

    It ends when the environment ends it. If the environment does not answer as the user, it ends with the first message
    that calls no tool.
    """
    messages: list[Message] = []
    said = next(turns)
    while True:
        message = {"role": "assistant", "content": said} if isinstance(said, str) else said
        messages.append(message)
        heard = _answers(message, environment, tools)
        if not heard:
            turns.close()
            return messages
        messages += heard
        said = turns.send(heard[-1]["content"])


def _answers(message: Message, environment: Any, tools: Toolbox) -> list[Message]:
    if calls := message.get("tool_calls"):
        return [_called(one["function"], tools) for one in calls]
    if not speaks(environment):
        return []
    wants_text = "text" in inspect.signature(environment.step).parameters
    answer = environment.step(message["content"] if wants_text else message)
    if isinstance(answer, Step):
        if answer.done:
            return []
        answer = answer.result
    return [{"role": "user", "content": answer} if isinstance(answer, str) else answer]


def _called(function: Mapping[str, Any], tools: Toolbox) -> Message:
    result = tools[function["name"]](**function["arguments"])
    return {"role": "tool", "name": function["name"], "content": str(result)}
