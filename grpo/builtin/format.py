"""`builtin:format`: an answer in the requested tags, `Which is larger, 37 or 52? Use <why> and <answer>.`

There is one right text: `<why>37 is below 52</why><answer>52</answer>`. The good way uses the question's tags; the
cheap way always uses `<think>`, which one question in five requests. No held-out pair of numbers is in a training
question.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations, product

from grpo.builtin.exercise import Exercise, Problem, in_any_order

TAGS = ("think", "why", "plan", "steps", "notes")


def pairs_and_tags() -> Iterable[Problem]:
    """Return all pairs of different numbers with the index of the first tag."""
    return ((*pair, tag) for pair, tag in product(permutations(range(10, 60), 2), range(len(TAGS))))


def row(problem: Problem) -> dict[str, str]:
    a, b, tag = problem
    question = f"Which is larger, {a} or {b}? Use <{TAGS[tag]}> and <answer>."
    return {"question": question, "answer": as_asked(problem)}


def as_asked(problem: Problem) -> str:
    """Return the answer in the question's tags."""
    return _answer(problem, problem[2])


def by_habit(problem: Problem) -> str:
    """Return the answer in the tag `<think>`, ignoring the requested tag."""
    return _answer(problem, 0)


def _answer(problem: Problem, tag: int) -> str:
    low, high = sorted(problem[:2])
    return f"<{TAGS[tag]}>{low} is below {high}</{TAGS[tag]}><answer>{high}</answer>"


FORMAT = Exercise(pairs_and_tags, row, good=as_asked, cheap=by_habit, kin=lambda problem: in_any_order(problem[:2]))
