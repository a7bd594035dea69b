"""A regular expression that the completion must match, or must not match."""

import re
from collections.abc import Callable
from typing import Any

from grpo.scoring.text import texts

CALLS = "completion"


def reward(
    pattern: str, whole: bool = False, ignore_case: bool = False, absent: bool = False
) -> Callable[..., list[float]]:
    """1.0 if `pattern` is found in the completion (`whole`: if it matches the whole completion), else 0.0.

    `absent` reverses the scores. A dot also matches line breaks.
    """
    try:
        expression = re.compile(pattern, re.DOTALL | (re.IGNORECASE if ignore_case else 0))
    except re.error as error:
        raise ValueError(f"kwargs.pattern: {pattern!r} is not a regular expression: {error}") from None
    match = expression.fullmatch if whole else expression.search

    def score(completions: list[Any], **_: Any) -> list[float]:
        return [float((match(text) is None) == absent) for text in texts(completions)]

    return score


CASES = [
    {"completion": "So: 42.", "kwargs": {"pattern": r"\d+"}, "score": 1.0},
    {"completion": "So: many.", "kwargs": {"pattern": r"\d+"}, "score": 0.0},
    {"completion": "42\n", "kwargs": {"pattern": r"\d+", "whole": True}, "score": 0.0},
    {"completion": "<a>\n42</a>", "kwargs": {"pattern": "<a>.*</a>", "whole": True}, "score": 1.0},
    {"completion": "SORRY", "kwargs": {"pattern": "sorry", "ignore_case": True, "absent": True}, "score": 0.0},
    {"completion": "", "kwargs": {"pattern": "sorry", "absent": True}, "score": 1.0},
]
