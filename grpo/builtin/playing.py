"""Conversations with a built-in task's environment, spoken by a written way to play instead of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from typing import Any

from grpo.step import Step
from grpo.types import Message

Turns = Generator[str | Message, str, None]
"""A way to play: it yields what the model would say, a text or a message with `tool_calls`, and is sent the answer."""
Toolbox = Mapping[str, Callable[..., Any]]


def tools_of(environment: object, beside: tuple[Callable[..., Any], ...] = ()) -> Toolbox:
    """The tools by name, in the order in which a prompt lists them: those beside the environment, then its methods."""
    reserved = {"reset", "get_reward"} | ({"step"} if speaks(environment) else set())
    methods = [
        getattr(environment, name)
        for name, _ in inspect.getmembers(type(environment), inspect.isfunction)
        if not name.startswith("_") and name not in reserved
    ]
    return {tool.__name__: tool for tool in (*beside, *methods)}


def speaks(environment: object) -> bool:
    """Whether it answers as the user does, by `step(text)` or `step(message)`."""
    step = getattr(environment, "step", None)
    return callable(step) and bool({"text", "message"} & set(inspect.signature(step).parameters))


def call(tool: str, **arguments: Any) -> Message:
    """What the model says to call a tool."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": tool, "arguments": arguments}}],
    }


def played(turns: Turns, environment: Any, tools: Toolbox) -> list[Message]:
    """The messages of a whole conversation, from the first that the model says.

    It ends when the environment ends it, or with a message that calls no tool where the environment does not speak.
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
