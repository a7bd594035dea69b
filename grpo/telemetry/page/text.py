"""Values as text for the page: JSON that cannot end its own block, and columns of tokens in a byte each."""

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
"""A surprise of x nats is the digit `16 √x`: fine where tokens are likely, up to 15.5 nats."""

PageJson = dict[str, Any]
"""An object of the page's data."""
DIGITS = 5
"""Significant digits of a value."""


def as_json(value: Any) -> str:
    """Compact JSON for a block of a page: `<` is written `\\u003c`, so that no text can end the block or begin another.

    Lone surrogates, which no file can hold, become `?`. Raises ValueError for NaN and infinity.
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)
    return text.replace("<", "\\u003c").encode(errors="replace").decode()


def size_of(value: Any) -> int:
    """The bytes that a value takes in the page."""
    return len(as_json(value).encode())


def number(value: float | None) -> float | None:
    """A value as the page has it: rounded, whole where it is whole; None for what JSON has no word for."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded


def counts(numbers: Iterable[int]) -> str:
    """Counts as digits: each as many times 63 as there are `_`, plus the digit that follows."""
    return "".join("_" * (number // CARRY) + ALPHABET[number % CARRY] for number in numbers)


def surprises(logprobs: Iterable[float], trained: Iterable[bool]) -> str:
    """The surprise -log p of each token as a digit; 0 for tokens that nobody sampled."""
    return "".join(ALPHABET[_level(-value) if own else 0] for value, own in zip(logprobs, trained, strict=True))


def _level(nats: float) -> int:
    return min(CARRY, round(FINENESS * math.sqrt(max(0.0, nats)))) if math.isfinite(nats) else CARRY


def spans_of(trained: Sequence[bool]) -> list[int]:
    """How many tokens are trained, then how many are not, then how many are, …"""
    lengths = [len(list(members)) for _, members in groupby(trained)]
    return lengths if not trained or trained[0] else [0, *lengths]


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and its end where it is longer than so many characters."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n\n[… {len(text) - 2 * half:,} characters left out …]\n\n{text[-half:]}"
