"""What a completion has come to: its tokens, and what they say."""

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
"""What a character decodes to of which tokens are missing yet."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What new tokens add to what was said. `calls` are those of the whole turn, told at its end."""

    content: str = ""
    reasoning: str = ""
    calls: Sequence[dict[str, Any]] = ()


@dataclass(slots=True)
class Completed:
    """A completion. `index` is its number in the answer; `characters` counts those of the tokens that were told, each
    decoded alone."""

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
        """Why it ended, as OpenAI has it: whatever cut it short is its length."""
        if self.ended != "stop":
            return "length"
        return "tool_calls" if calls else "stop"


def said_of(prompt: Spoken, choice: Completed, message: Message) -> Answered:
    """A choice that has ended, as sessions remember it. `message` is what it says."""
    before = prompt.follows
    marks = () if prompt.settings is None else (*prompt.marks, *marks_of([message]))
    own = prompt.ids if before is None else prompt.ids[len(before.prompt_ids) + len(before.token_ids) :]
    return Answered(prompt.messages, message, own, tuple(choice.token_ids), prompt.settings, marks, before)


class Reader:
    """Reads a completion, piece by piece or at its end. Without a `voice` it is plain text."""

    def __init__(self, speaker: Speaker, stopping: Stopping, voice: Voice | None = None) -> None:
        self._speaker, self._stopping, self._voice = speaker, stopping, voice
        self._spelled = _Spelled(speaker, special=voice is not None and voice.thinking is not None)
        self._shown = Delta()

    def message(self, token_ids: Sequence[int]) -> dict[str, Any]:
        """The assistant's message of a completion that has ended: `content`, and `tool_calls` and `reasoning_content`
        if there are any, as the environments of a training run read it."""
        if self._voice is None:
            return {"role": "assistant", "content": self._stopping.turn_text(token_ids)}
        said = token_ids[:-1] if token_ids[-1:] and token_ids[-1] in self._stopping.stop_ids else token_ids
        return without_end(self._voice.chat.parse(said), self._stopping.cut(token_ids))

    def delta(self, piece: Piece, whole: Sequence[int]) -> Delta:
        """What a piece adds; `whole` are all tokens so far, with the piece's. The deltas add up to the message,
        unless the model ends thinking that it has not begun, or begins it twice: then it was told as something else.

        A text that may begin a stop string, or a mark of thinking, waits until that is decided. Where there are tools
        the content waits for the end, since what a call is, is known only then.
        """
        if piece.ended is not None:
            return self._last(self.message(whole))
        reasoning, content = self._read(self._spelled.add(piece.token_ids))
        return self._advance(content, reasoning)

    def _read(self, text: str) -> tuple[str, str]:
        """The reasoning and the content that are certain."""
        thinking = self._voice.thinking if self._voice else None
        marks = (*self._stopping.sampling.stop, *((thinking.start, thinking.end) if thinking else ()))
        text = text[: sure(text, marks)]
        if self._voice is None or thinking is None:
            return "", "" if self._voice and self._voice.calls else text
        thought, said = thinking.split(text)
        said = self._voice.template.specials.sub(
            "", said.partition(thinking.start)[0]
        )  # from there on it may be thinking
        said = "" if self._voice.calls or not said.strip() else said
        return thought if thought and thought.strip() else "", said

    def _advance(self, content: str, reasoning: str) -> Delta:
        """What is new; nothing where it is not what was shown and more."""
        content = content if content.startswith(self._shown.content) else self._shown.content
        reasoning = reasoning if reasoning.startswith(self._shown.reasoning) else self._shown.reasoning
        new = Delta(content[len(self._shown.content) :], reasoning[len(self._shown.reasoning) :])
        self._shown = Delta(content, reasoning)
        return new

    def _last(self, message: dict[str, Any]) -> Delta:
        new = self._advance(message["content"], message.get("reasoning_content") or "")
        return Delta(new.content, new.reasoning, message.get("tool_calls") or ())


class _Spelled:
    """The text of tokens that come one after another, without decoding all of them again each time.

    The tokens since the last whole character are decoded together with some before them: a tokenizer may write a token
    otherwise at the beginning of a text.
    """

    def __init__(self, speaker: Speaker, special: bool) -> None:
        self._speaker, self._special = speaker, special
        self._ids: list[int] = []
        self._begin = self._read = 0
        self._text = ""

    def add(self, token_ids: Sequence[int]) -> str:
        """The text of all tokens so far, but for the last of them if they are not yet a character."""
        self._ids += token_ids
        before, now = (self._decode(self._ids[self._begin : end]) for end in (self._read, len(self._ids)))
        if not now.endswith(BROKEN):
            if new := now[len(before) :]:
                self._begin = self._read  # where there is a text: special tokens alone are no beginning
            self._text, self._read = self._text + new, len(self._ids)
        return self._text

    def _decode(self, ids: Sequence[int]) -> str:
        return self._speaker.text(ids, special=self._special)
