"""`builtin:sorting`: five different digits in order, `Sort 5 2 9 1 7.`

The good way inserts the digits one by one (`5 25 259 1259 12579`, then `#### 1 2 5 7 9`). The cheap way makes one pass
from left to right that swaps neighbors in the wrong order, which sorts two lists in fifteen. Held-out questions have
other sets of digits.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from itertools import permutations

from grpo.builtin.exercise import Exercise, Problem

LENGTH = 5


def digits() -> Iterable[Problem]:
    return permutations(range(1, 10), LENGTH)


def row(digits: Problem) -> dict[str, str]:
    return {"question": f"Sort {_listed(digits)}.", "answer": _listed(sorted(digits))}


def inserted(digits: Problem) -> str:
    """Return the sorted digits after each insertion, and then the answer."""
    sorted_so_far: list[int] = []
    steps = []
    for digit in digits:
        insort(sorted_so_far, digit)
        steps.append("".join(map(str, sorted_so_far)))
    return f"{' '.join(steps)}\n#### {_listed(sorted_so_far)}"


def swapped(digits: Problem) -> str:
    """Return the result of one pass of swaps as the answer."""
    left = list(digits)
    for i in range(len(left) - 1):
        if left[i] > left[i + 1]:
            left[i], left[i + 1] = left[i + 1], left[i]
    return f"#### {_listed(left)}"


def _listed(digits: Sequence[int]) -> str:
    return " ".join(map(str, digits))


SORTING = Exercise(digits, row, good=inserted, cheap=swapped)
