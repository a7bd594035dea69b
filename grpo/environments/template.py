"""A chat template as conversations use it: rendered text, control tokens, and the joints between turns."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from grpo.backend.hub import one_line
from grpo.data.rendering import Schema, rendered_text
from grpo.errors import UserError
from grpo.types import Message

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper

Calls = Literal["all", "first", "none"]
"""Which calls of a turn a template writes: some write one call per turn, and some expect calls in the turn's text."""
Shared = TypeVar("Shared", str, list[int])
MARK = "qzjxkv"
"""Placeholder for the model's turn in conversations that are rendered to find the text after the turn."""
QUESTION: Message = {"role": "user", "content": "Hi."}
BREAK = "\ufdd0"
"""Splits control tokens that appear in a message as text. No text has this code point: it is a noncharacter."""
IDS = "call{:05d}"
"""Generated ids of calls, with the nine letters and digits that Mistral's templates require."""


@dataclass(frozen=True)
class Template:
    """A model's chat template with the tools that it shows, and the ids of the tokens that end the model's turn."""

    tokenizer: TokenizerWrapper
    tools: Sequence[Schema]
    kwargs: Mapping[str, Any]
    stop_ids: Collection[int]

    def render(self, messages: Sequence[Message], generation: bool) -> str:
        """Return the rendered messages, with `generation` also the beginning of the model's turn.

        Raises UserError for messages that the template refuses.
        """
        try:
            return rendered_text(self.tokenizer, messages, self.tools, self.kwargs, generation)
        except Exception as error:  # the template is the model's own code
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the model's chat template refuses a conversation of {roles}: {one_line(error)}"
            ) from error

    def takes(self, messages: Sequence[Message]) -> bool:
        """Whether the template renders these messages without an error."""
        try:
            self.render(messages, generation=False)
        except UserError:
            return False
        return True

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a rendered text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int], special: bool = True) -> str:
        """Return the text of tokens, with or without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=not special))

    @cached_property
    def special(self) -> dict[str, int]:
        """The ids of the special tokens by their texts."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {token.content: index for index, token in added if token.special or index in self.stop_ids}

    @cached_property
    def specials(self) -> re.Pattern[str]:
        """A pattern for special tokens, to remove them from texts that people read."""
        return _any_of(self.special)

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        return _any_of(text for text, index in self.special.items() if index in self.stop_ids)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """A pattern for special tokens and for other added tokens that the template itself writes."""
        written = str(self.tokenizer.chat_template or "")
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        return _any_of(text for text in added if text in self.special or (text in written and not text.isspace()))

    def end_in(self, text: str, start: int = 0) -> re.Match[str] | None:
        """Find the token that ends the model's turn: the first stop token, or else the first special token."""
        return self._ends.search(text, start) or self.specials.search(text, start)

    def harmless(self, content: str) -> str:
        """Return a message's content with every control token split by `BREAK`; see `encode_after`."""
        return self._control.sub(lambda found: found[0][0] + BREAK + found[0][1:], content)

    def encode_after(self, end: str, text: str) -> tuple[int, ...]:
        """Return the token ids of a text that follows the special token `end`, as they are in the whole conversation.

        Tokenizers split a text at special tokens first, so the tokens after `end` do not depend on the text before it.
        Control tokens that `harmless` has split become ordinary tokens of the same characters.
        """
        return tuple(token for piece in text.split(BREAK) for token in self.encode(end + piece)[1:])

    def encode_plain(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text without a template. Control tokens become ordinary text."""
        return tuple(token for piece in self.harmless(text).split(BREAK) for token in self.encode(piece))


def _any_of(texts: Any) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def before(messages: Sequence[Message], calls: Calls, ids: Sequence[str | None] = (), **more: Any) -> list[Message]:
    """Return a conversation that these messages may follow: a question, and a turn that ends with `MARK`.

    If the messages are results of tools, the turn calls the tools, as far as the template writes `calls`. `ids` are the
    model's ids of the calls. `more` are further keys of the turn.
    """
    results = [message for message in messages if message["role"] == "tool"]
    if not results or calls == "none":
        return [QUESTION, {"role": "assistant", "content": MARK, **more}]
    names = [str(result.get("name")) for result in (results if calls == "all" else results[:1])]
    made = [_call(name, number, ids) for number, name in enumerate(names)]
    made[-1]["function"]["arguments"] = {"text": MARK}
    return [QUESTION, {"role": "assistant", "content": "", "tool_calls": made, **more}]


def _call(name: str, number: int, ids: Sequence[str | None]) -> dict[str, Any]:
    return {"id": id_of(number, ids), "type": "function", "function": {"name": name, "arguments": {"text": "x"}}}


def id_of(number: int, ids: Sequence[str | None]) -> str:
    """Return the id of a call: the model's id, or a generated id."""
    own = ids[number] if number < len(ids) else None
    return own or IDS.format(number)


def with_ids(messages: Sequence[Message], ids: Sequence[str | None]) -> list[Message]:
    """Return the messages with the ids of calls in the tools' results, for templates that show the ids to the model."""
    numbered, results = [], 0
    for message in messages:
        if message["role"] == "tool":
            message = {"tool_call_id": id_of(results, ids), **message}
            results += 1
        numbered.append(message)
    return numbered


def shared(one: Shared, other: Shared) -> Shared:
    """Return the common prefix of two texts, or of two lists of tokens."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differ, min(len(one), len(other)))]


def harmless(message: Message, template: Template) -> Message:
    """Return a message with no whole control token in its content, or in the name by which the model called a tool."""
    texts = {key: template.harmless(message[key]) for key in ("content", "name") if isinstance(message.get(key), str)}
    return {**message, **texts}


def with_texts(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with their contents as text."""
    return [{**one, "content": text_of(one.get("content", ""))} for one in messages]


def text_of(content: Any) -> str:
    """Return a message's content as text, for templates of text models. Raises UserError for images and audio."""
    if content is None or isinstance(content, str):
        return content or ""
    blocks = content if isinstance(content, list | tuple) else [content]
    texts = [block.get("text") if isinstance(block, Mapping) else None for block in blocks]
    if odd := [block for block, text in zip(blocks, texts, strict=True) if not isinstance(text, str)]:
        raise UserError(f"a message has content that is not text, {str(odd[0])[:80]!r}: only text is supported")
    return "".join(map(str, texts))
