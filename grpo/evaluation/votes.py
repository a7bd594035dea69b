"""Extracts final answers for majority votes; answers that differ only in format count as the same vote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

BOXED, NUMBER = "\\boxed{", re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def final_answer(text: str) -> str:
    r"""The last `\boxed{...}`, or else the text after the last `####`, the last number, or the whole text."""
    if BOXED in text:
        return _normal(_inside_braces(text.rpartition(BOXED)[2]))
    if "####" in text:
        return _normal(text.rpartition("####")[2])
    numbers = NUMBER.findall(text)
    return _normal(numbers[-1] if numbers else text)


def majority(answers: Sequence[str]) -> int:
    """The index of the first occurrence of the most common answer; of equally common answers, the earliest."""
    return answers.index(Counter(answers).most_common(1)[0][0])


def _inside_braces(text: str) -> str:
    """The text up to the closing brace of the group that was opened before the text."""
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:place]
    return text


def _normal(answer: str) -> str:
    """The answer without spaces, commas, dollar signs or a final period, in lower case; numbers in shortest form."""
    plain = re.sub(r"[\s,$]", "", answer).rstrip(".").lower()
    try:
        return f"{float(plain):.12g}"
    except ValueError:
        return plain
