"""Whether the completion, or the match of a pattern in it, is exactly the answer."""

import re
from typing import Any

from grpo.scoring.text import texts

CALLS = "completion"


def reward(
    completions: list[Any], answer: list[Any], extract: str | None = None, ignore_case: bool = True, **_: Any
) -> list[float | None]:
    r"""1.0 if completion and answer are equal except for white space (and case), else 0.0; None if the answer is null.

    `extract` is a regular expression: its last match (or the match's first group, if there is one) is compared instead
    of the whole completion. In a list of answers, each answer is right.
    """
    return [_grade(text, gold, extract, ignore_case) for text, gold in zip(texts(completions), answer, strict=True)]


def _grade(completion: str, answer: Any, extract: str | None, ignore_case: bool) -> float | None:
    if answer is None:
        return None
    if extract is not None:
        found = list(re.finditer(extract, completion, re.DOTALL))
        if not found:
            return 0.0
        completion = found[-1][min(1, found[-1].re.groups)] or ""
    answers = answer if isinstance(answer, list) else [answer]
    return float(_normal(completion, ignore_case) in [_normal(str(gold), ignore_case) for gold in answers])


def _normal(text: str, ignore_case: bool) -> str:
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text


CASES = [
    {"completion": " Paris\n", "answer": "paris", "score": 1.0},
    {"completion": "Paris", "answer": "paris", "kwargs": {"ignore_case": False}, "score": 0.0},
    {"completion": "It is Paris", "answer": "Paris", "score": 0.0},
    {"completion": "NYC", "answer": ["New York", "NYC"], "score": 1.0},
    {"completion": "<a>no</a> <a>7</a>", "answer": 7, "kwargs": {"extract": "<a>(.*?)</a>"}, "score": 1.0},
    {"completion": "7", "answer": 7, "kwargs": {"extract": "<a>(.*?)</a>"}, "score": 0.0},
    {"completion": "anything", "answer": None, "score": None},
    {"completion": "", "answer": "Paris", "score": 0.0},
]
