"""`builtin:countdown`: make a number from three others with + - *, `Make 26 from 3, 7 and 5.`

The answer is an expression that uses each number once, `<answer>3*7+5</answer>`. The good way searches for it: it
writes one form after another with its value. The cheap way immediately claims the first form, the sum. No held-out
question has the same numbers as a training question, in any order and with any target.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

from grpo.builtin.exercise import Exercise, Problem, in_any_order

FORMS = ("++", "*+", "+-")
"""The operators between the three numbers, in the order in which they are tried."""


def numbers_and_forms() -> Iterable[Problem]:
    """Yield three numbers and the index of the first form that makes the target, which is positive."""
    for a, b, c in product(range(1, 10), repeat=3):
        values = [_value(form, a, b, c) for form in FORMS]
        yield from ((a, b, c, form) for form, value in enumerate(values) if value > 0 and value not in values[:form])


def row(problem: Problem) -> dict[str, Any]:
    a, b, c, form = problem
    target = _value(FORMS[form], a, b, c)
    return {"question": f"Make {target} from {a}, {b} and {c}.", "numbers": [a, b, c], "target": target}


def searched(problem: Problem) -> str:
    """Return every form with its value, up to the form that makes the target."""
    a, b, c, found = problem
    tried = [f"{a}{form[0]}{b}={_first(form, a, b)}{form[1]}{c}={_value(form, a, b, c)}" for form in FORMS[: found + 1]]
    return "\n".join([*tried, _answer(FORMS[found], a, b, c)])


def claimed(problem: Problem) -> str:
    """Return the first form, without checking its value."""
    return _answer(FORMS[0], *problem[:3])


def _first(form: str, a: int, b: int) -> int:
    return a * b if form[0] == "*" else a + b


def _value(form: str, a: int, b: int, c: int) -> int:
    return _first(form, a, b) + (c if form[1] == "+" else -c)


def _answer(form: str, a: int, b: int, c: int) -> str:
    return f"<answer>{a}{form[0]}{b}{form[1]}{c}</answer>"


COUNTDOWN = Exercise(
    numbers_and_forms, row, good=searched, cheap=claimed, kin=lambda problem: in_any_order(problem[:3])
)
