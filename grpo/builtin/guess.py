"""`builtin:guess`: a number to guess in four turns, `Guess my number: 12 to 26.`, from hints, `higher` and `lower`.

`Guess` is a text environment: what the model says goes to `step`, and what `step` returns is said to the model. The
number can be found by halving what is left, with the bounds written down (`12 to 26: 19`, `higher`, `20 to 26: 23`),
or looked for from the lowest on (`12`, `higher`, `13`), which finds four in fifteen. Held-out numbers are of ranges
that training knows, but none of its numbers in them.
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
"""So many numbers are in the range: what four guesses can tell apart."""
GUESSES = 4


class Guess:
    """Thinks of a number, and says whether a guess is too low or too high."""

    def reset(self, number: int, **_: Any) -> None:
        self._number, self._left, self._found = number, GUESSES, False

    def step(self, text: str) -> str | Step:
        """The last number in the text is the guess."""
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
        """1 if the number was found, else 0."""
        return float(self._found)


def ranges_and_numbers() -> Iterable[Problem]:
    """The lowest number of a range, and a number in it."""
    return ((low, low + place) for low, place in product(range(10, 85), range(SPAN)))


def row(problem: Problem) -> dict[str, Any]:
    low, number = problem
    return {"question": f"Guess my number: {low} to {low + SPAN - 1}.", "number": number}


def halved(problem: Problem) -> Turns:
    """The middle of what is left, with its bounds."""
    low, high = problem[0], problem[0] + SPAN - 1
    while True:
        middle = (low + high) // 2
        if (yield f"{low} to {high}: {middle}") == "higher":
            low = middle + 1
        else:
            high = middle - 1


def counted(problem: Problem) -> Turns:
    """One number after the other, from the lowest on."""
    guess = problem[0]
    while True:
        yield str(guess)
        guess += 1


GUESS = Exercise(ranges_and_numbers, row, good=halved, cheap=counted, kin=lambda problem: problem, environment=Guess)
