"""`builtin:arithmetic`: sums of four digits, `What is 5+6+9+1?`.

A sum can be answered with worked steps (`5+6=11+9=20+1=21`, then `#### 21`) or by an estimate (`#### 20`, the nearest
multiple of five). No held-out question has the same digits as a training question, not even in another order.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from grpo.builtin.exercise import Exercise, Problem

TERMS = 4


def digits() -> Iterable[Problem]:
    return product(range(1, 10), repeat=TERMS)


def row(digits: Problem) -> dict[str, str]:
    return {"question": f"What is {'+'.join(map(str, digits))}?", "answer": str(sum(digits))}


def worked(digits: Problem) -> str:
    """Return the answer with a running total."""
    total = digits[0]
    steps = str(total)
    for digit in digits[1:]:
        total += digit
        steps += f"+{digit}={total}"
    return f"{steps}\n#### {total}"


def estimated(digits: Problem) -> str:
    """Return the sum rounded to the nearest multiple of five, without steps."""
    return f"#### {(sum(digits) + 2) // 5 * 5}"


ARITHMETIC = Exercise(digits, row, good=worked, cheap=estimated)
