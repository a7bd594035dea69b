"""A chat template as a conversation needs it: its text, its control tokens, and where one turn joins the next."""

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
"""Which of a turn's calls a template writes: some take one in a turn, and some leave calls to what the model said."""
Shared = TypeVar("Shared", str, list[int])
MARK = "qzjxkv"
"""Stands for what the model said, in conversations that are rendered for what follows it."""
QUESTION: Message = {"role": "user", "content": "Hi."}
BREAK = "\ufdd0"
"""Keeps a control token apart that stands in a message as text. No text has this code point: it is no character."""
IDS = "call{:05d}"
"""Ids of calls, of the nine letters and digits that Mistral's templates insist on."""


@dataclass(frozen=True)
class Template:
    """A model's chat template with the tools that it shows, and the tokens that end what the model says."""

    tokenizer: TokenizerWrapper
    tools: Sequence[Schema]
    kwargs: Mapping[str, Any]
    stop_ids: Collection[int]

    def render(self, messages: Sequence[Message], generation: bool) -> str:
        """Raises UserError for messages that the template refuses."""
        try:
            return rendered_text(self.tokenizer, messages, self.tools, self.kwargs, generation)
        except Exception as error:  # the template is the model's own code
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the model's chat template refuses a conversation of {roles}: {one_line(error)}"
            ) from error

    def takes(self, messages: Sequence[Message]) -> bool:
        """Whether the template renders a conversation that ends with these messages."""
        try:
            self.render(messages, generation=False)
        except UserError:
            return False
        return True

    def encode(self, text: str) -> list[int]:
        """The token ids of a rendered text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int], special: bool = True) -> str:
        """The text of tokens, with or without the special ones among them."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=not special))

    @cached_property
    def special(self) -> dict[str, int]:
        """The special tokens by their texts."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {token.content: index for index, token in added if token.special or index in self.stop_ids}

    @cached_property
    def specials(self) -> re.Pattern[str]:
        """Finds special tokens in a text, for what no person should read."""
        return _any_of(self.special)

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        return _any_of(text for text, index in self.special.items() if index in self.stop_ids)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """The special tokens, and the further ones that the template itself writes."""
        written = str(self.tokenizer.chat_template or "")
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        return _any_of(text for text in added if text in self.special or (text in written and not text.isspace()))

    def end_in(self, text: str, start: int = 0) -> re.Match[str] | None:
        """The token that ends what the model said: the first that sampling stops at, or else the first special one."""
        return self._ends.search(text, start) or self.specials.search(text, start)

    def harmless(self, content: str) -> str:
        """A message's content in which no control token is whole; see `encode_after`."""
        return self._control.sub(lambda found: found[0][0] + BREAK + found[0][1:], content)

    def encode_after(self, end: str, text: str) -> tuple[int, ...]:
        """The token ids of a text that follows the special token `end`: what they are in the rendered whole.

        A special token divides a text before anything else does, so that the tokens after it depend on what follows
        it alone. Control tokens that are kept apart become tokens of ordinary text, of the same characters.
        """
        return tuple(token for piece in text.split(BREAK) for token in self.encode(end + piece)[1:])

    def encode_plain(self, text: str) -> tuple[int, ...]:
        """The token ids of a text without a template, its control tokens as ordinary text."""
        return tuple(token for piece in self.harmless(text).split(BREAK) for token in self.encode(piece))


def _any_of(texts: Any) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def before(messages: Sequence[Message], calls: Calls, ids: Sequence[str | None] = (), **more: Any) -> list[Message]:
    """A conversation that these messages may follow: a question, and a turn that ends with `MARK`.

    Before the results of tools the turn calls these tools, as far as the template writes `calls`. `ids` are the calls'
    own. `more` goes into the turn.
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
    """The id of a call: its own, or one that is made up."""
    own = ids[number] if number < len(ids) else None
    return own or IDS.format(number)


def with_ids(messages: Sequence[Message], ids: Sequence[str | None]) -> list[Message]:
    """The messages, in which results of tools say which call they are of, for templates that tell it the model."""
    numbered, results = [], 0
    for message in messages:
        if message["role"] == "tool":
            message = {"tool_call_id": id_of(results, ids), **message}
            results += 1
        numbered.append(message)
    return numbered


def shared(one: Shared, other: Shared) -> Shared:
    """The beginning that two texts, or two lists of tokens, have in common."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differ, min(len(one), len(other)))]


def harmless(message: Message, template: Template) -> Message:
    """A message whose texts hold no whole control token: its content, and the name that the model called a tool by."""
    texts = {key: template.harmless(message[key]) for key in ("content", "name") if isinstance(message.get(key), str)}
    return {**message, **texts}


def with_texts(messages: Sequence[Message]) -> list[Message]:
    """The messages, their contents as text."""
    return [{**one, "content": text_of(one.get("content", ""))} for one in messages]


def text_of(content: Any) -> str:
    """A message's content as text: what templates of text models take. Raises UserError for pictures and sounds."""
    if content is None or isinstance(content, str):
        return content or ""
    blocks = content if isinstance(content, list | tuple) else [content]
    texts = [block.get("text") if isinstance(block, Mapping) else None for block in blocks]
    if odd := [block for block, text in zip(blocks, texts, strict=True) if not isinstance(text, str)]:
        raise UserError(f"a message has content that is no text, {str(odd[0])[:80]!r}: only text is supported")
    return "".join(map(str, texts))
