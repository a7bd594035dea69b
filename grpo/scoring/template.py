"""The file that `grpo rewards new` writes."""

TEMPLATE = '''"""One line that says what this reward grades."""

import re
from typing import Any

# What one call gets: "completion" (a failure affects only one completion), "group" (all completions of a prompt) or
# "step" (all completions of a training step, for functions that compare, or that send batches to a service).
CALLS = "completion"


def reward(completions: list[Any], answer: list[Any], points: float = 1.0, **columns: Any) -> list[float | None]:
    """A score for each completion; None if there is nothing to grade, which is not the same as 0.

    Each column of the dataset arrives by name with one value per completion (here `answer`), and so do `prompts` and
    `completion_ids`. The recipe sets `points`: `kwargs: {points: 2}`. The function may be async. If it raises an
    exception, grpo records the failure and leaves the completion out of training.
    """
    return [score(text_of(c), a, points) for c, a in zip(completions, answer, strict=True)]


def score(completion: str, answer: Any, points: float) -> float | None:
    if answer is None:
        return None
    numbers = re.findall(r"-?\\d+(?:\\.\\d+)?", completion)
    return points if numbers and numbers[-1] == str(answer) else 0.0


def text_of(completion: Any) -> str:
    """The text, for text prompts and for chat prompts."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


# The expected scores: `grpo rewards test` runs these cases, then unusual completions.
CASES = [
    {"completion": "3 + 4 is 7", "answer": "7", "score": 1.0},
    {"completion": "3 + 4 is 8", "answer": "7", "score": 0.0},
    {"completion": "", "answer": "7", "score": 0.0},
    {"completion": "7", "answer": None, "score": None},
    {"completion": "7", "answer": 7, "kwargs": {"points": 2.0}, "score": 2.0},
]
'''
