r"""A mathematical answer, compared by value: LaTeX, fractions, units, sets, intervals, plain numbers (math-verify)."""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

from math_verify import LatexExtractionConfig, parse, verify

from grpo.scoring.text import texts

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # an answer that cannot be parsed is only wrong

CALLS = "completion"
SECONDS = 3
"""Time limit for parsing an expression, and for comparing two: some expressions would take forever."""


def reward(
    completions: list[Any],
    answer: list[Any],
    mode: Literal["lenient", "strict"] = "lenient",
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> list[float | None]:
    r"""1.0 if the completion's final answer equals the gold answer, else 0.0; None if the gold answer cannot be parsed.

    The gold answer is LaTeX, a number, or a text that ends in GSM8K's `#### N`. With `lenient`, the completion's answer
    is its last `\boxed{...}`, LaTeX expression or number; with `strict`, only a `\boxed{...}` or a LaTeX formula
    counts. Both results are logged, as `math_answer/lenient` and `math_answer/strict`.
    """
    scores: list[float | None] = []
    for text, gold in zip(texts(completions), answer, strict=True):
        expected = _gold(str(gold))
        if not expected:
            scores.append(None)
            continue
        loose = _lenient(text)
        strict = _strict(text) if loose else None  # without a lenient answer there is no strict one
        same = strict is not None and str(strict[-1:]) == str(loose[-1:])  # comparing can be slow: do it once
        lenient = _equal(expected, loose)
        found = {"lenient": lenient, "strict": lenient if same else _equal(expected, strict)}
        for name, value in found.items():
            if log_metric is not None:
                log_metric(f"math_answer/{name}", value)
        scores.append(found[mode])
    return scores


@lru_cache(maxsize=4096)
def _gold(answer: str) -> Any:
    gold = answer.rpartition("####")[2].strip().replace(",", "") if "####" in answer else answer.strip()
    return _lenient(gold) or _lenient(f"${gold}$")


def _lenient(text: str) -> Any:
    return parse(text, parsing_timeout=SECONDS)


def _strict(text: str) -> Any:
    latex = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    return parse(text, extraction_config=[latex], extraction_mode="first_match", parsing_timeout=SECONDS)


def _equal(expected: Any, found: Any) -> float:
    return float(bool(found) and verify(expected, found, timeout_seconds=SECONDS))


CASES = [
    {"completion": r"So the answer is \boxed{\frac{1}{2}}", "answer": r"\frac{1}{2}", "score": 1.0},
    {"completion": r"\boxed{0.5}", "answer": r"$\frac{1}{2}$", "score": 1.0},
    {"completion": "The answer is 72.", "answer": "48/2 = 24, so 48+24 = 72\n#### 72", "score": 1.0},
    {"completion": "The answer is 72.", "answer": "72", "kwargs": {"mode": "strict"}, "score": 0.0},
    {"completion": r"It is \boxed{72}.", "answer": "72", "kwargs": {"mode": "strict"}, "score": 1.0},
    {"completion": r"\boxed{1200}", "answer": "#### 1,200", "score": 1.0},
    {"completion": r"\boxed{(1, 2]}", "answer": r"$(1, 2]$", "score": 1.0},
    {"completion": r"\boxed{[1, 2]}", "answer": r"$(1, 2]$", "score": 0.0},
    {"completion": r"\boxed{12\text{ cm}}", "answer": "12", "score": 1.0},
    {"completion": r"\boxed{\{3, 1\}}", "answer": r"$\{1, 3\}$", "score": 1.0},
    {"completion": r"\boxed{50\%}", "answer": "0.5", "score": 1.0},
    {"completion": r"\boxed{2\sqrt{2}}", "answer": r"$\sqrt{8}$", "score": 1.0},
    {"completion": r"\boxed{3}", "answer": "4", "score": 0.0},
    {"completion": "", "answer": "4", "score": 0.0},
    {"completion": "no idea", "answer": "4", "score": 0.0},
    {"completion": r"\boxed{", "answer": "4", "score": 0.0},
    {"completion": r"\boxed{4}", "answer": "", "score": None},
]
