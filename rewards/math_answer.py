r"""A mathematical answer, compared by value: LaTeX, fractions, sets, intervals, plain numbers (math-verify)."""

import logging
from typing import Any

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # an answer that cannot be parsed is wrong, not news


def reward(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    r"""1.0 where the completion's final answer equals the gold one, else 0.0; None where the gold cannot be parsed.

    The gold answer is LaTeX or a number, or a text that ends in GSM8K's `#### N`. The completion's is the last
    `\boxed{...}`, LaTeX expression or number in it.
    """
    return [_grade(_text(c), str(a)) for c, a in zip(completions, answer, strict=True)]


def _grade(completion: str, answer: str) -> float | None:
    gold = answer.rpartition("####")[2].strip().replace(",", "") if "####" in answer else answer.strip()
    expected = parse(gold) or parse(f"${gold}$")
    if not expected:
        return None
    return float(verify(expected, parse(completion)))


def _text(completion: Any) -> str:
    return str(completion if isinstance(completion, str) else completion[-1]["content"])


CASES = [
    {"completion": r"So the answer is \boxed{\frac{1}{2}}", "answer": r"\frac{1}{2}", "score": 1.0},
    {"completion": r"\boxed{0.5}", "answer": r"$\frac{1}{2}$", "score": 1.0},
    {"completion": "The answer is 72.", "answer": "48/2 = 24, so 48+24 = 72\n#### 72", "score": 1.0},
    {"completion": r"\boxed{1200}", "answer": "#### 1,200", "score": 1.0},
    {"completion": r"\boxed{(1, 2]}", "answer": r"$(1, 2]$", "score": 1.0},
    {"completion": r"\boxed{3}", "answer": "4", "score": 0.0},
    {"completion": "", "answer": "4", "score": 0.0},
    {"completion": "no idea", "answer": "4", "score": 0.0},
    {"completion": r"\boxed{", "answer": "4", "score": 0.0},
]
