"""`builtin:arithmetic`: sums of four digits, `What is 5+6+9+1?`.

A sum can be answered by working (`5+6=11+9=20+1=21`, then `#### 21`) or by estimating (`#### 20`, the nearest
multiple of five). Held-out questions are not training questions in another order either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import product

from grpo.errors import UserError

ARITHMETIC = "builtin:arithmetic"
TERMS = 4
HELD_OUT = 8  # one in so many

Digits = tuple[int, ...]


def rows(source: str, split: str) -> list[dict[str, str]]:
    """The rows of a built-in task, with columns `question` and `answer`, in a fixed mixed order."""
    if source != ARITHMETIC:
        raise UserError(f"data {source}: no such built-in; there is {ARITHMETIC}")
    if split not in ("train", "test"):
        raise UserError(f"data {source}: no split {split!r}; there are 'train' and 'test'")
    return [{"question": question(digits), "answer": str(sum(digits))} for digits in problems(split)]


def problems(split: str) -> list[Digits]:
    """The terms of each question of a split, `train` or `test`, in a fixed mixed order."""
    mine = [digits for digits in product(range(1, 10), repeat=TERMS) if _held_out(digits) == (split == "test")]
    return sorted(mine, key=_hash)


def question(digits: Sequence[int]) -> str:
    return f"What is {'+'.join(map(str, digits))}?"


def worked(digits: Sequence[int]) -> str:
    """The answer with a running total."""
    total = digits[0]
    steps = str(total)
    for digit in digits[1:]:
        total += digit
        steps += f"+{digit}={total}"
    return f"{steps}\n#### {total}"


def estimated(digits: Sequence[int]) -> str:
    """The answer to the nearest multiple of five, at once."""
    return f"#### {(sum(digits) + 2) // 5 * 5}"


def _held_out(digits: Digits) -> bool:
    return _hash(tuple(sorted(digits)))[0] % HELD_OUT == 0


def _hash(digits: Digits) -> bytes:
    return hashlib.sha256(bytes(digits)).digest()
