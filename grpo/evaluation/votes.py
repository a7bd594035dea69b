"""What a completion answers, for majority votes: the same answer in other words is the same vote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

BOXED, NUMBER = "\\boxed{", re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def final_answer(text: str) -> str:
    r"""The last `\boxed{...}`; or what follows the last `####`; or the last number; or the whole text."""
    if BOXED in text:
        return _normal(_inside_braces(text.rpartition(BOXED)[2]))
    if "####" in text:
        return _normal(text.rpartition("####")[2])
    numbers = NUMBER.findall(text)
    return _normal(numbers[-1] if numbers else text)


def majority(answers: Sequence[str]) -> int:
    """The place of the first of the answers that most agree on; of equally common ones the earliest."""
    return answers.index(Counter(answers).most_common(1)[0][0])


def _inside_braces(text: str) -> str:
    """The text up to the brace that closes one opened before it."""
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:place]
    return text


def _normal(answer: str) -> str:
    """Without spaces, thousands' commas, signs of currency, or a full stop; a number as the shortest text of it."""
    plain = re.sub(r"[\s,$]", "", answer).rstrip(".").lower()
    try:
        return f"{float(plain):.12g}"
    except ValueError:
        return plain
