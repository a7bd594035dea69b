"""When a completion ends. Asked on the host, after every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo.generation.sampling import Sampling
from grpo.types import FinishReason

LONGEST_REPEAT = 16
"""Tokens of the longest n-gram whose repetition is looked for."""

Decode = Callable[[Sequence[int]], str]


class Stopping:
    """The rules of one `generate` call."""

    def __init__(self, sampling: Sampling, stop_ids: frozenset[int], decode: Decode) -> None:
        self.sampling = sampling
        self.stop_ids = stop_ids | frozenset(sampling.stop_ids)
        self._decode = decode
        # A token is at least one byte; four more allow for a character that is cut at the window's edge.
        self._window = max((len(text.encode()) for text in sampling.stop), default=0) + 4

    def reason(self, token_ids: Sequence[int]) -> FinishReason | None:
        """Why the completion ends with its last token, or None if it goes on."""
        if token_ids[-1] in self.stop_ids or self._stopped_by_text(token_ids):
            return "stop"
        if self.sampling.max_repeats and repeats(token_ids, self.sampling.max_repeats):
            return "repetition"
        return "length" if len(token_ids) >= self.sampling.max_tokens else None

    def text(self, token_ids: Sequence[int]) -> str:
        """The completion's text: without its stop token, and up to the first stop string."""
        shown = token_ids[:-1] if token_ids[-1] in self.stop_ids else token_ids
        text = self._decode(shown)
        ends = [end for end in map(text.find, self.sampling.stop) if end >= 0]
        return text[: min(ends)] if ends else text

    def _stopped_by_text(self, token_ids: Sequence[int]) -> bool:
        if not self.sampling.stop or len(token_ids) < self.sampling.min_tokens:
            return False
        tail = self._decode(token_ids[-self._window :])
        return any(text in tail for text in self.sampling.stop)


def repeats(token_ids: Sequence[int], times: int) -> bool:
    """Whether the tokens end in some n-gram `times` times in a row."""
    longest = min(LONGEST_REPEAT, len(token_ids) // times)
    return any(
        all(token_ids[-i] == token_ids[-i - length] for i in range(1, length * (times - 1) + 1))
        for length in range(1, longest + 1)
    )
