"""The completions of a request: their tokens, and the text, thinking and tool calls in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo.environments.chat import without_end
from grpo.generation.stopping import Stopping, sure
from grpo.serving.asks import Piece
from grpo.serving.sessions import Answered, marks_of
from grpo.serving.speaker import Speaker, Spoken, Voice
from grpo.types import FinishReason, Message

FinishedBy = Literal["stop", "length", "tool_calls"]
BROKEN = "\ufffd"
"""What a character decodes to while some of its tokens are missing."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What new tokens add to a message. `calls` are all tool calls of the turn, and come at its end."""

    content: str = ""
    reasoning: str = ""
    calls: Sequence[dict[str, Any]] = ()


@dataclass(slots=True)
class Completed:
    """A completion. `index` is its number in the response; `characters` is the number of characters sent so far, with
    each token decoded alone."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: FinishReason | None = None
    characters: int = 0

    def add(self, piece: Piece) -> None:
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.ended = piece.ended

    def finished_by(self, calls: bool = False) -> FinishedBy:
        """OpenAI's finish reason: every reason but a stop counts as `length`."""
        if self.ended != "stop":
            return "length"
        return "tool_calls" if calls else "stop"


def said_of(prompt: Spoken, choice: Completed, message: Message) -> Answered:
    """A choice that has ended, in the form that sessions remember. `message` is the choice as a message."""
    before = prompt.follows
    marks = () if prompt.settings is None else (*prompt.marks, *marks_of([message]))
    new = prompt.ids if before is None else prompt.ids[len(before.prompt_ids) + len(before.token_ids) :]
    return Answered(prompt.messages, message, new, tuple(choice.token_ids), prompt.settings, marks, before)


class Reader:
    """Reads a completion, piece by piece or at its end. Without a `voice`, it is plain text."""

    def __init__(self, speaker: Speaker, stopping: Stopping, voice: Voice | None = None) -> None:
        self._speaker, self._stopping, self._voice = speaker, stopping, voice
        self._spelled = _Spelled(speaker, special=voice is not None and voice.thinking is not None)
        self._shown = Delta()

    def message(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """The assistant message of a completion that has ended: `content`, and `tool_calls` and `reasoning_content` if
        there are any. The environments of a training run parse completions in the same way."""
        if self._voice is None:
            return {"role": "assistant", "content": self._stopping.turn_text(token_ids)}
        unstopped = token_ids[:-1] if token_ids[-1:] and token_ids[-1] in self._stopping.stop_ids else token_ids
        return without_end(self._voice.chat.parse(unstopped), self._stopping.cut(token_ids))

    def delta(self, piece: Piece, whole: Sequence[int]) -> Delta:
        """What a piece adds to the message; `whole` are all tokens so far, including the piece's.

        Together, the deltas give the message, except if the model ends thinking that it has not begun, or begins
        thinking twice: then some text was sent as the wrong kind. Text that may be the beginning of a stop string or of
        a mark of thinking is held back until that is known. With tools, the content is held back until the end, because
        only then it is known which parts are calls.
        """
        if piece.ended is not None:
            return self._last(self.message(whole))
        reasoning, content = self._read(self._spelled.add(piece.token_ids))
        return self._advance(content, reasoning)

    def _read(self, text: str) -> tuple[str, str]:
        """The reasoning and the content that later tokens cannot change."""
        thinking = self._voice.thinking if self._voice else None
        marks = (*self._stopping.sampling.stop, *((thinking.start, thinking.end) if thinking else ()))
        text = text[: sure(text, marks)]
        if self._voice is None or thinking is None:
            return "", "" if self._voice and self._voice.calls else text
        thought, content = thinking.split(text)
        # After another mark, the text may be thinking.
        content = self._voice.template.specials.sub("", content.partition(thinking.start)[0])
        content = "" if self._voice.calls or not content.strip() else content
        return thought if thought and thought.strip() else "", content

    def _advance(self, content: str, reasoning: str) -> Delta:
        """The new part of both texts. A text that does not continue what was sent adds nothing."""
        content = content if content.startswith(self._shown.content) else self._shown.content
        reasoning = reasoning if reasoning.startswith(self._shown.reasoning) else self._shown.reasoning
        new = Delta(content[len(self._shown.content) :], reasoning[len(self._shown.reasoning) :])
        self._shown = Delta(content, reasoning)
        return new

    def _last(self, message: dict[str, Any]) -> Delta:
        new = self._advance(message["content"], message.get("reasoning_content") or "")
        return Delta(new.content, new.reasoning, message.get("tool_calls") or ())


class _Spelled:
    """Incremental detokenization: the text of a growing list of tokens, without decoding all of them again.

    The tokens since the last complete character are decoded together with some earlier tokens, because a tokenizer may
    decode a token differently at the beginning of a text.
    """

    def __init__(self, speaker: Speaker, special: bool) -> None:
        self._speaker, self._special = speaker, special
        self._ids: list[int] = []
        self._begin = self._read = 0
        self._text = ""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text of all tokens so far, except the last tokens while they are not yet a complete character."""
        self._ids += token_ids
        before, now = (self._decode(self._ids[self._begin : end]) for end in (self._read, len(self._ids)))
        if not now.endswith(BROKEN):
            if new := now[len(before) :]:
                self._begin = self._read  # only with new text: special tokens alone are not a usable beginning
            self._text, self._read = self._text + new, len(self._ids)
        return self._text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._speaker.text(ids, special=self._special)
