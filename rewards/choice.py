r"""Multiple choice: whether the completion's final letter is the answer."""

import re
from typing import Any

from grpo.scoring.text import texts

CALLS = "completion"

SAID = re.compile(
    r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\b"
    r"|\b(?i:answer|choice|option)\**+(?i:\s++is\b)?\s*+[:=]?[\s*]*+[$(]?\b([A-Z])\b(?!')",
)
ALONE = re.compile(r"(?:^|\n)\s*\**\(?([A-Z])\)?\**[.:)]?\s*(?:$|\n)")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def reward(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    r"""1.0 if the completion's letter is the answer, else 0.0; None if the answer is neither a letter nor an index.

    The answer is a letter, or an index from 0. The completion's letter is the last one that it states as its answer:
    `\boxed{B}`, `answer: B`, `the answer is (B)`; or else the last letter on a line of its own.
    """
    return [_grade(text, _letter(gold)) for text, gold in zip(texts(completions), answer, strict=True)]


def _grade(completion: str, answer: str | None) -> float | None:
    if answer is None:
        return None
    said = [boxed or named for boxed, named in SAID.findall(completion)] or ALONE.findall(completion)
    return float(bool(said) and said[-1] == answer)


def _letter(answer: Any) -> str | None:
    text = str(answer).strip().strip("()").upper()
    if text.isdecimal():
        return LETTERS[int(text)] if int(text) < len(LETTERS) else None
    return text if len(text) == 1 and text in LETTERS else None


CASES = [
    {"completion": "The answer is (B).", "answer": "B", "score": 1.0},
    {"completion": "Answer: **C**", "answer": 2, "score": 1.0},
    {"completion": "**Answer:** C", "answer": "C", "score": 1.0},
    {"completion": "**Answer**: C", "answer": "C", "score": 1.0},
    {"completion": "The answer is $C$.", "answer": "C", "score": 1.0},
    {"completion": "The answer is\n\n**C)** Paris", "answer": "C", "score": 1.0},
    {"completion": "answer" + " " * 100_000, "answer": "C", "score": 0.0},
    {"completion": r"\boxed{\text{D}}", "answer": "d", "score": 1.0},
    {"completion": "B", "answer": "B", "score": 1.0},
    {"completion": "(B)", "answer": "B", "score": 1.0},
    {"completion": "A cat is not a dog.\nA", "answer": "A", "score": 1.0},
    {"completion": "The answer is A. No, the answer is B.", "answer": "A", "score": 0.0},
    {"completion": "A or B, who knows", "answer": "A", "score": 0.0},
    {"completion": "", "answer": "A", "score": 0.0},
    {"completion": "A", "answer": "none of these", "score": None},
]
