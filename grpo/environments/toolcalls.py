"""Parsers for tool calls in a model's turn, in one table of the formats of model families.

Families that mlx-lm knows are read by mlx-lm's own parsers. A call that cannot be parsed remains text.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from grpo.data.rendering import Schema

Call = dict[str, Any]
"""`name` and `arguments` (a dict), and `id` if the model wrote an id."""
Parser = Callable[[str, Sequence[Schema]], Any]
"""Parses the text between the marks of a call into a call or a list of calls. It may raise and return anything."""
CLOSINGS = 8
"""How many closing marks to try for a call, because an argument may contain the mark as text."""


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """A parsed turn: `content`, `calls` in their order, and `reasoning` (None if there is no reasoning)."""

    content: str
    calls: tuple[Call, ...] = ()
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class CallFormat:
    """A format of tool calls. `read` never raises."""

    name: str
    read: Callable[[str, Sequence[Schema]], ParsedTurn]


def between(name: str, start: str, end: str, parse: Parser) -> CallFormat:
    """Return the format of calls between marks. With an empty `end`, a call extends to the next `start`, or to the end
    of the turn."""

    def read(text: str, tools: Sequence[Schema]) -> ParsedTurn:
        rest, calls, at = [], [], 0
        while (begin := text.find(start, at)) >= 0:
            found, after = _closed(text, begin + len(start), start, end, lambda inner: calls_of(parse, inner, tools))
            rest.append(text[at : begin if found else after])
            calls += found
            at = after
        rest.append(text[at:])
        content = "".join(rest)
        return ParsedTurn(content.strip(), tuple(calls)) if calls else ParsedTurn(content)

    return CallFormat(name, read)


def _closed(text: str, inner: int, start: str, end: str, parsed: Callable[[str], list[Call]]) -> tuple[list[Call], int]:
    """Return the calls that begin at `inner` (empty if they cannot be parsed) and the position after them."""
    if not end:
        close = text.find(start, inner)
        close = len(text) if close < 0 else close
        return parsed(text[inner:close]), close
    close = inner - len(end)
    for _ in range(CLOSINGS):
        close = text.find(end, close + len(end))
        if close < 0:
            break
        if calls := parsed(text[inner:close]):
            return calls, close + len(end)
    return [], inner


def calls_of(parse: Parser, text: str, tools: Sequence[Schema]) -> list[Call]:
    """Return the calls that a parser finds in a text; empty unless each call has a name and named arguments."""
    try:
        with warnings.catch_warnings(action="ignore"):  # Python's parser may warn about the style of the text
            found = parse(text, tools)
        json.dumps(found)  # Python literals may have values that JSON does not have
    except Exception:  # the model may write anything: this is not a call
        return []
    given = found if isinstance(found, list) else [found]
    calls = [call for call in map(_call, given) if call is not None]
    return calls if len(calls) == len(given) else []


def _call(given: Any) -> Call | None:
    if not isinstance(given, dict):
        return None
    name = given.get("name")
    arguments = given.get("arguments", given.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    own = {"id": given["id"]} if isinstance(given.get("id"), str) else {}
    return {"name": name, "arguments": arguments, **own}


def _json(text: str, tools: Sequence[Schema]) -> Any:  # noqa: ARG001
    return json.loads(text, strict=False)


def _python_calls(text: str) -> list[Call]:
    """Parse `[f(a=1), g()]`. Raises for anything else."""
    listed = ast.parse(text.strip(), mode="eval").body
    if not isinstance(listed, ast.List):
        raise ValueError(text)
    return [_python_call(one) for one in listed.elts]


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError(ast.dump(node))
    arguments = {str(one.arg): ast.literal_eval(one.value) for one in node.keywords}
    return {"name": ast.unparse(node.func), "arguments": arguments}


def _json_calls(text: str) -> list[Any]:
    """Parse consecutive JSON objects, separated by blanks or semicolons. Raises for anything else."""
    decoder, found, at = json.JSONDecoder(strict=False), [], 0
    while at < len(text):
        one, at = decoder.raw_decode(text, at)
        if not isinstance(one, dict) or not {"parameters", "arguments"} & set(one):
            raise ValueError(text)
        found.append(one)
        while at < len(text) and text[at] in "; \n":
            at += 1
    return found


def _llama(text: str, tools: Sequence[Schema]) -> ParsedTurn:
    """Parse a turn of Llama 3: either an answer, or only calls, as JSON or Python. A tag may precede the calls."""
    before, tag, after = text.partition("<|python_tag|>")
    written = (after if tag else before).strip()
    parse = _python_calls if written.startswith("[") else _json_calls
    calls = calls_of(lambda inner, _: parse(inner), written, tools) if written else []
    return ParsedTurn(before.strip() if tag else "", tuple(calls)) if calls else ParsedTurn(text)


_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


def _harmony(text: str, tools: Sequence[Schema]) -> ParsedTurn:
    """Parse a turn of gpt-oss: messages on channels. Calls have a recipient, and thinking is on `analysis`."""
    said, thought, calls = [], [], []
    for message in re.split(r"<\|start\|>(?:assistant)?", text):
        header, mark, body = message.partition("<|message|>")
        body = re.sub(r"<\|(?:end|call|return)\|>.*", "", body, flags=re.DOTALL) if mark else header
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header) if mark else None
        found = calls_of(partial(_named, recipient[1]), body, tools) if recipient else []
        if found:
            calls += found
        elif mark and channel is not None and channel[1] == "analysis":
            thought.append(body)
        else:
            said.append(body)
    return ParsedTurn("".join(said), tuple(calls), "\n".join(thought) if thought else None)


def _named(recipient: str, text: str, tools: Sequence[Schema]) -> Call:
    return {"name": recipient, "arguments": _json(text, tools)}


HARMONY = CallFormat("gpt-oss (harmony)", _harmony)
FORMATS = (
    HARMONY,
    between("JSON in <tool_call>", "<tool_call>", "</tool_call>", _json),
    between("JSON in <|tool_call|>", "<|tool_call|>", "<|/tool_call|>", _json),
    between("JSON in [TOOL_CALLS]", "[TOOL_CALLS]", "", _json),
    CallFormat("Llama 3 (JSON, or Python)", _llama),
)
"""Formats to try, in this order, after mlx-lm's own parser: the first that reads back the template's calls is used."""
