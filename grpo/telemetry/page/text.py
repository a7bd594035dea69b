"""Encodes values for the page: JSON that cannot end its script block, and per-token columns with one byte per token."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
"""The digits 0 to 63."""
CARRY = len(ALPHABET) - 1
FINENESS = 16
"""A surprise of x nats becomes the digit `16 √x`: fine resolution for likely tokens, a maximum of 15.5 nats."""

PageJson = dict[str, Any]
"""An object of the page's data."""
DIGITS = 5
"""Significant digits of a value."""


def as_json(value: Any) -> str:
    """Compact JSON for a script block: `<` becomes `\\u003c`, so that no text can end the block or begin another one.

    Lone surrogates become `?`, because UTF-8 cannot encode them. Raises ValueError for NaN and infinity.
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)
    return text.replace("<", "\\u003c").encode(errors="replace").decode()


def size_of(value: Any) -> int:
    """Number of bytes of a value in the page."""
    return len(as_json(value).encode())


def number(value: float | None) -> float | None:
    """A value for the page: rounded to `DIGITS` digits, an int if it is whole; None for NaN, infinity and None."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded


def counts(numbers: Iterable[int]) -> str:
    """Counts as digits: each count is a number of `_`, worth 63 each, plus one digit."""
    return "".join("_" * (number // CARRY) + ALPHABET[number % CARRY] for number in numbers)


def surprises(logprobs: Iterable[float], trained: Iterable[bool]) -> str:
    """The surprise -log p of each token as a digit; 0 for tokens that the policy did not sample."""
    pairs = zip(logprobs, trained, strict=True)
    return "".join(ALPHABET[_level(-value) if is_sampled else 0] for value, is_sampled in pairs)


def _level(nats: float) -> int:
    return min(CARRY, round(FINENESS * math.sqrt(max(0.0, nats)))) if math.isfinite(nats) else CARRY


def spans_of(trained: Sequence[bool]) -> list[int]:
    """Run lengths of the mask: number of trained tokens, then of untrained tokens, then of trained tokens, …"""
    lengths = [len(list(members)) for _, members in groupby(trained)]
    return lengths if not trained or trained[0] else [0, *lengths]


def shortened(text: str, most: int) -> str:
    """The text; if it has more than `most` characters, its beginning and its end."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n\n[… {len(text) - 2 * half:,} characters left out …]\n\n{text[-half:]}"
