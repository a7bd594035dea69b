"""The rules that end a completion, checked on the host after every token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from grpo.generation.sampling import Sampling
from grpo.types import FinishReason

LONGEST_REPEAT = 16
"""Length in tokens of the longest n-gram that is checked for repetition."""

Way = tuple[Sampling, frozenset[int]]
"""All that determines how a row's tokens are drawn: its sampling without the rules that end it, and its stop tokens."""
Decode = Callable[[Sequence[int]], str]


class Stopping:
    """The rules that end a row's turn. The turn begins at token `begin`, counted after the prompt.

    Repetitions, stop strings and `max_turn_tokens` apply to the turn only; `min_tokens` and `max_tokens` count all
    tokens after the first `opening` tokens, which belong to the prompt.
    """

    def __init__(
        self, sampling: Sampling, stop_ids: frozenset[int], decode: Decode, begin: int = 0, opening: int = 0
    ) -> None:
        self.sampling = sampling
        self.stop_ids = stop_ids | frozenset(sampling.stop_ids)
        self._decode, self._begin, self._opening = decode, begin, opening
        self._least = sampling.min_tokens and opening + sampling.min_tokens
        drawn = replace(
            sampling, max_tokens=0, stop=(), stop_ids=(), max_repeats=0, max_turn_tokens=0, min_tokens=self._least
        )
        self.way: Way = drawn, self.stop_ids
        # A token has at least one byte; four more bytes allow for a character that is cut at the window's edge.
        self._window = max((len(text.encode()) for text in sampling.stop), default=0) + 4

    def from_token(self, begin: int) -> Stopping:
        """The same rules for a turn that begins later."""
        return Stopping(self.sampling, self.stop_ids, self._decode, begin, self._opening)

    def after_opening(self, length: int) -> Stopping:
        """The same rules for a row whose own prompt has `length` tokens."""
        return Stopping(self.sampling, self.stop_ids, self._decode, length, length)

    def reason(self, token_ids: Sequence[int]) -> FinishReason | None:
        """Why the completion ends with its last token, or None if it continues."""
        if token_ids[-1] in self.stop_ids or self._stopped_by_text(token_ids):
            return "stop"
        if self.sampling.max_repeats and repeats(token_ids, self.sampling.max_repeats, self._begin):
            return "repetition"
        if len(token_ids) - self._opening >= self.sampling.max_tokens:
            return "length"
        most = self.sampling.max_turn_tokens
        return "max_turn_tokens" if most and len(token_ids) - self._begin >= most else None

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of all turns, without the opening and the last stop token, up to the last turn's first stop string.

        Earlier turns and injected tokens are included in full, as the model read them.
        """
        shown = self._shown(token_ids)
        turn = self._decode(shown[self._begin :])
        whole = self._decode(shown[self._opening :]) if self._begin > self._opening else turn
        end = self._stop_in(turn, shown, self._begin)
        # Count from the end: the first tokens of a turn may decode differently after other tokens than alone.
        return whole if end is None else whole[: len(whole) - (len(turn) - end)]

    def turn_text(self, token_ids: Sequence[int]) -> str:
        """The text of only the last turn, without its stop token, up to its first stop string."""
        shown = self._shown(token_ids)
        turn = self._decode(shown[self._begin :])
        return turn[: self._stop_in(turn, shown, self._begin)]

    def cut(self, token_ids: Sequence[int]) -> str:
        """The text that `turn_text` leaves out at the end of the last turn: the stop string, if one ended the turn."""
        if not self.sampling.stop:
            return ""
        turn, text = self._decode(self._shown(token_ids)[self._begin :]), self.turn_text(token_ids)
        return turn[len(text) :]

    def _shown(self, token_ids: Sequence[int]) -> Sequence[int]:
        return token_ids[:-1] if token_ids and token_ids[-1] in self.stop_ids else token_ids

    def sure(self, text: str) -> int:
        """The number of characters of an unfinished completion's text that cannot be part of a stop string."""
        return sure(text, self.sampling.stop)

    def _stopped_by_text(self, token_ids: Sequence[int]) -> bool:
        if not self.sampling.stop or len(token_ids) < self._least:
            return False
        start = max(self._begin, len(token_ids) - self._window)
        return self._stop_in(self._decode(token_ids[start:]), token_ids, start) is not None

    def _stop_in(self, text: str, token_ids: Sequence[int], start: int) -> int | None:
        """Where the first stop string begins in the text of `token_ids[start:]`; it cannot end before `min_tokens`."""
        early = token_ids[start : max(start, self._least - 1)] if self.sampling.stop else ()
        least = len(self._decode(early)) if early else 0
        found = (text.find(stop, max(0, least - len(stop) + 1)) for stop in self.sampling.stop)
        return min((at for at in found if at >= 0), default=None)


def sure(text: str, marks: Iterable[str]) -> int:
    """The number of characters of an unfinished text that are not the beginning of a mark."""
    begun = (n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n]))
    return len(text) - max(begun, default=0)


def repeats(token_ids: Sequence[int], times: int, begin: int = 0) -> bool:
    """Whether the tokens from `begin` on end with an n-gram that is repeated `times` times in a row."""
    longest = min(LONGEST_REPEAT, (len(token_ids) - begin) // times)
    return any(
        all(token_ids[-i] == token_ids[-i - length] for i in range(1, length * (times - 1) + 1))
        for length in range(1, longest + 1)
    )
