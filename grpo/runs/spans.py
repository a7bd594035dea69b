"""Maps the tokens of a completion to parts of its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

PARTIAL = "\N{REPLACEMENT CHARACTER}"
"""Appears in the text of a token that holds only part of a character's bytes."""
LONGEST_GAP = 16
"""Maximum number of characters that consecutive tokens with parts of characters may spell together."""


def characters(token_ids: Sequence[int], text: str, piece: Callable[[int], str]) -> list[int] | None:
    """The number of characters of `text` that each token adds to it; None if the tokens do not spell the text.

    `piece` returns the text of a single token, empty for special tokens. If several tokens spell one character, it
    counts for the last of them. A tokenizer may drop the space that a token begins with. A stop string may cut the text
    short: tokens after its end have 0.
    """
    lengths, at, open_since = [0] * len(token_ids), 0, None
    for place, token in enumerate(token_ids):
        spelled = piece(token)
        if PARTIAL in spelled:
            open_since = place if open_since is None else open_since
            continue
        if not spelled:
            continue
        if open_since is not None:
            begin = _next(text, spelled, at)
            if begin is None:
                return None
            lengths[place - 1] += begin - at
            at, open_since = begin, None
        found = _matched(text, spelled, at)
        if found is None:
            return None
        lengths[place] = found
        at += found
    if open_since is not None:
        lengths[-1] += min(len(text) - at, LONGEST_GAP)
        at += min(len(text) - at, LONGEST_GAP)
    return lengths if at == len(text) else None


def _matched(text: str, spelled: str, at: int) -> int | None:
    """The number of characters that a token has at position `at`: its own, perhaps with a space before them, or those
    that are left if the text ends within the token. None if the text does not match."""
    if text.startswith(spelled, at):
        return len(spelled)
    if text.startswith(f" {spelled}", at):
        return len(spelled) + 1
    left = len(text) - at
    return left if spelled.startswith(text[at:]) else None


def _next(text: str, spelled: str, at: int) -> int | None:
    """The position of a token that follows tokens with parts of characters; None if it is not within LONGEST_GAP."""
    return next((at + gap for gap in range(LONGEST_GAP + 1) if text.startswith(spelled, at + gap)), None)
