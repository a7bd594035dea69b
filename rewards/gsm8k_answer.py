"""The number after `####`, GSM8K's convention (arXiv 2110.14168): 1 if it equals the answer, else 0."""

import re
from typing import Any

from grpo.scoring.text import texts

CALLS = "completion"
NUMBER = re.compile(r"####\s*(-?\$?|\$-)(\d[\d,]*(?:\.\d+)?|\.\d+)")


def reward(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """1.0 if the completion's last `#### N` equals the answer, else 0.0.

    The answer is a number, or a text that ends in `#### N`. None for any other answer.
    """
    return [_grade(text, str(gold)) for text, gold in zip(texts(completions), answer, strict=True)]


def _grade(completion: str, answer: str) -> float | None:
    gold = _number(answer if "####" in answer else f"#### {answer}")
    return None if gold is None else float(_number(completion) == gold)


def _number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float("".join(found[-1]).replace(",", "").replace("$", "")) if found else None


CASES = [
    {"completion": "3+4=7 #### 7", "answer": "7", "score": 1.0},
    {"completion": "#### 7", "answer": "First 3, then 4.\n#### 7", "score": 1.0},
    {"completion": "#### 7.", "answer": 7, "score": 1.0},
    {"completion": "#### 1,200", "answer": "1200", "score": 1.0},
    {"completion": "#### $12.50", "answer": "12.5", "score": 1.0},
    {"completion": "#### 6 no, #### 7", "answer": "7", "score": 1.0},
    {"completion": "#### -3", "answer": "-3", "score": 1.0},
    {"completion": "#### -$3", "answer": "-3", "score": 1.0},
    {"completion": "#### $-3", "answer": "-3", "score": 1.0},
    {"completion": "#### --3", "answer": "-3", "score": 0.0},
    {"completion": "#### -$-3", "answer": "-3", "score": 0.0},
    {"completion": "#### 8", "answer": "7", "score": 0.0},
    {"completion": "7", "answer": "7", "score": 0.0},
    {"completion": "", "answer": "7", "score": 0.0},
    {"completion": "#### 7", "answer": "n/a", "score": None},
    {"completion": "####", "answer": "7", "score": 0.0},
    {"completion": "#### ,", "answer": "7", "score": 0.0},
    {"completion": [{"role": "assistant", "content": "#### 7"}], "answer": "7", "score": 1.0},
]
