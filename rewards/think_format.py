"""Format: one `<think>...</think>` block, then an answer."""

from typing import Any

from grpo.scoring.text import texts

CALLS = "completion"


def reward(completions: list[Any], opened: bool = False, **_: Any) -> list[float]:
    """1.0 if the completion is one nonempty `<think>` block followed by text, else 0.0.

    `opened`: the chat template already ends with `<think>`, so the completion begins inside the block.
    """
    return [_grade(text, opened) for text in texts(completions)]


def _grade(completion: str, opened: bool) -> float:
    text = "<think>" + completion if opened else completion.lstrip()
    if not text.startswith("<think>") or text.count("<think>") != 1 or text.count("</think>") != 1:
        return 0.0
    thought, _, answer = text.removeprefix("<think>").partition("</think>")
    return float(bool(thought.strip()) and bool(answer.strip()))


CASES = [
    {"completion": "<think>\n3+4=7\n</think>\n7", "score": 1.0},
    {"completion": "\n<think>so</think>7", "score": 1.0},
    {"completion": "3+4=7</think>7", "kwargs": {"opened": True}, "score": 1.0},
    {"completion": "<think>3+4=7</think>7", "kwargs": {"opened": True}, "score": 0.0},
    {"completion": "<think>so</think>", "score": 0.0},
    {"completion": "<think> </think>7", "score": 0.0},
    {"completion": "<think>so 7", "score": 0.0},
    {"completion": "Well. <think>so</think>7", "score": 0.0},
    {"completion": "<think>a</think><think>b</think>7", "score": 0.0},
    {"completion": "", "score": 0.0},
]
