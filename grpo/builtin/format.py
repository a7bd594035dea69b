"""`builtin:format`: an answer in the tags that are asked for, `Which is larger, 37 or 52? Use <why> and <answer>.`

There is one right text: `<why>37 is below 52</why><answer>52</answer>`. The tags can be those of the question, or those
of habit, `<think>`, which one question in five asks for. Held-out pairs of numbers are none of the training questions'.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations, product

from grpo.builtin.exercise import Exercise, Problem, in_any_order

TAGS = ("think", "why", "plan", "steps", "notes")


def pairs_and_tags() -> Iterable[Problem]:
    """Two different numbers, and the index of the first tag."""
    return ((*pair, tag) for pair, tag in product(permutations(range(10, 60), 2), range(len(TAGS))))


def row(problem: Problem) -> dict[str, str]:
    a, b, tag = problem
    question = f"Which is larger, {a} or {b}? Use <{TAGS[tag]}> and <answer>."
    return {"question": question, "answer": as_asked(problem)}


def as_asked(problem: Problem) -> str:
    """The answer in the question's tags."""
    return _answer(problem, problem[2])


def by_habit(problem: Problem) -> str:
    """The answer in the first tags, whichever were asked for."""
    return _answer(problem, 0)


def _answer(problem: Problem, tag: int) -> str:
    low, high = sorted(problem[:2])
    return f"<{TAGS[tag]}>{low} is below {high}</{TAGS[tag]}><answer>{high}</answer>"


FORMAT = Exercise(pairs_and_tags, row, good=as_asked, cheap=by_habit, kin=lambda problem: in_any_order(problem[:2]))
