"""`builtin:guess`: a number to guess in four turns, `Guess my number: 12 to 26.`, from hints, `higher` and `lower`.

`Guess` is a text environment: `step` gets the model's text, and returns the text that answers the model. The good way
halves the remaining range and writes down its bounds (`12 to 26: 19`, `higher`, `20 to 26: 23`). The cheap way counts
up from the lowest number (`12`, `higher`, `13`), which finds four numbers in fifteen. Held-out questions use the ranges
of training questions, but other numbers in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import product
from typing import Any

from grpo.builtin.exercise import Exercise, Problem
from grpo.builtin.playing import Turns
from grpo.step import Step

SPAN = 15
"""Numbers in a range: the most that four guesses with hints can distinguish."""
GUESSES = 4


class Guess:
    """Thinks of a number, and says whether a guess is too low or too high."""

    def reset(self, number: int, **_: Any) -> None:
        self._number, self._left, self._found = number, GUESSES, False

    def step(self, text: str) -> str | Step:
        """Take the last number in the text as the guess, and return a hint."""
        self._left -= 1
        numbers = re.findall(r"\d+", text)
        guess = int(numbers[-1][:9]) if numbers else None
        self._found = guess == self._number
        if self._found or self._left == 0:
            return Step("Right." if self._found else f"It was {self._number}.", done=True)
        if guess is None:
            return "Say a number."
        return "higher" if guess < self._number else "lower"

    def get_reward(self) -> float:
        """Return 1 if the number was found, else 0."""
        return float(self._found)


def ranges_and_numbers() -> Iterable[Problem]:
    """Yield the lowest number of a range, and a number in the range."""
    return ((low, low + place) for low, place in product(range(10, 85), range(SPAN)))


def row(problem: Problem) -> dict[str, Any]:
    low, number = problem
    return {"question": f"Guess my number: {low} to {low + SPAN - 1}.", "number": number}


def halved(problem: Problem) -> Turns:
    """Yield the middle of the remaining range, with its bounds."""
    low, high = problem[0], problem[0] + SPAN - 1
    while True:
        middle = (low + high) // 2
        if (yield f"{low} to {high}: {middle}") == "higher":
            low = middle + 1
        else:
            high = middle - 1


def counted(problem: Problem) -> Turns:
    """Yield one number after another, starting with the lowest."""
    guess = problem[0]
    while True:
        yield str(guess)
        guess += 1


GUESS = Exercise(ranges_and_numbers, row, good=halved, cheap=counted, kin=lambda problem: problem, environment=Guess)
