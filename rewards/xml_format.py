"""Format: named blocks in order, such as `<reasoning>...</reasoning> <answer>...</answer>`, with no other text."""

from typing import Any

from grpo.scoring.text import texts

CALLS = "completion"


def reward(
    completions: list[Any], tags: tuple[str, ...] = ("reasoning", "answer"), partial: bool = False, **_: Any
) -> list[float]:
    """1.0 if the completion consists of these blocks, each once, in this order, none empty; else 0.0.

    `partial`: if the format is not right, the fraction of `tags` that open and close exactly once with text in between,
    times 0.9.
    """
    if not tags:
        raise ValueError("kwargs.tags: name at least one tag")
    return [_grade(text, tags, partial) for text in texts(completions)]


def _grade(completion: str, tags: tuple[str, ...], partial: bool) -> float:
    blocks = [_block(completion, tag) for tag in tags]
    rest = completion
    for tag, block in zip(tags, blocks, strict=True):
        whole = f"<{tag}>{block}</{tag}>"
        if block is None or not rest.lstrip().startswith(whole):
            return 0.9 * sum(block is not None for block in blocks) / len(tags) if partial else 0.0
        rest = rest.lstrip().removeprefix(whole)
    if rest.strip():
        return 0.9 if partial else 0.0
    return 1.0


def _block(text: str, tag: str) -> str | None:
    """The text between a tag's only opening and its only closing; None if it is missing or empty."""
    if text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1:
        return None
    inner = text.partition(f"<{tag}>")[2].partition(f"</{tag}>")
    return inner[0] if inner[1] and inner[0].strip() else None


CASES = [
    {"completion": "<reasoning>\n3+4\n</reasoning>\n<answer>7</answer>\n", "score": 1.0},
    {"completion": "<answer>7</answer><reasoning>3+4</reasoning>", "score": 0.0},
    {"completion": "<reasoning>3+4</reasoning><answer>7</answer> Bye", "score": 0.0},
    {"completion": "<reasoning>3+4</reasoning><answer>7</answer> Bye", "kwargs": {"partial": True}, "score": 0.9},
    {"completion": "<reasoning>3+4</reasoning>7", "kwargs": {"partial": True}, "score": 0.45},
    {"completion": "<reasoning></reasoning><answer>7</answer>", "score": 0.0},
    {"completion": "</answer>7<answer>", "kwargs": {"tags": ["answer"]}, "score": 0.0},
    {"completion": "<answer>7</answer>", "kwargs": {"tags": ["answer"]}, "score": 1.0},
    {"completion": "", "score": 0.0},
]
