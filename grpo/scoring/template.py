"""What `grpo rewards new` writes."""

TEMPLATE = '''"""What this reward grades, in a line."""

import re
from typing import Any

# What one call gets: "completion" (a failure costs that completion), "group" (all of a prompt) or "step" (all there
# are: for functions that compare, or that ask a service about many at once).
CALLS = "completion"


def reward(completions: list[Any], answer: list[Any], points: float = 1.0, **columns: Any) -> list[float | None]:
    """A score for each completion; None where there is nothing to grade, which is not the same as 0.

    Every column of the dataset arrives by name, a value for each completion (here `answer`); so do `prompts` and
    `completion_ids`. `points` is an argument of its own: `kwargs: {points: 2}` in the recipe sets it. The function
    may be async. What it raises is recorded, and that completion is left out.
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


# What it must get right: `grpo rewards test` runs these, then completions that nobody would write.
CASES = [
    {"completion": "3 + 4 is 7", "answer": "7", "score": 1.0},
    {"completion": "3 + 4 is 8", "answer": "7", "score": 0.0},
    {"completion": "", "answer": "7", "score": 0.0},
    {"completion": "7", "answer": None, "score": None},
    {"completion": "7", "answer": 7, "kwargs": {"points": 2.0}, "score": 2.0},
]
'''
