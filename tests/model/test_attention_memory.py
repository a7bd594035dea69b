"""Memory of attention in tiles, by MLX's peak: no scores of all pairs of tokens, and no prompt once for each row."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from grpo.model import attention as module
from grpo.model import tiles
from grpo.model.attention import PromptKeysValues, attention
from grpo.model.sight import Causal

HEADS, WIDTH = 2, 8


@pytest.fixture(autouse=True)
def _tiles_of_64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "WIDEST", {False: 64})
    monkeypatch.setattr(tiles, "SCORES", {False: 2**14})
    monkeypatch.setattr(module, "KEPT", 0)


def peak(rows: int, length: int, before: int = 0, backward: bool = True, prompts: int = 1) -> int:
    """Bytes beside the arrays that are given: the most of several times, because two threads make and free them."""
    given = [mx.random.normal((rows, HEADS, length, WIDTH), key=mx.random.key(i)) for i in range(3)]
    given += [mx.random.normal((prompts, HEADS, before, WIDTH)) for _ in range(2)] if before else []
    index, lengths = mx.arange(rows) % prompts, mx.full((rows,), before)

    def loss(*given: mx.array) -> mx.array:
        shared = PromptKeysValues(given[3], given[4], index) if before else None
        return attention(*given[:3], 1.0, Causal(None, lengths), shared).sum()

    function: Any = mx.grad(loss, list(range(len(given)))) if backward else loss
    mx.eval(given, index, lengths)
    resting = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(5):
        mx.eval(function(*given))
    return mx.get_peak_memory() - resting


@pytest.mark.parametrize("backward", [False, True])
def test_memory_grows_with_the_tokens_at_most(backward: bool) -> None:
    short, long = (peak(1, length, backward=backward) for length in (512, 1024))
    assert long < 1.1 * 2 * short
    assert long < HEADS * 1024**2 * 4 / 2  # bytes of all scores: 8 MB


@pytest.mark.quick_cases("2")
@pytest.mark.parametrize("prompts", [1, 2])
def test_a_prompt_is_not_repeated_for_its_rows(prompts: int) -> None:
    rows, before = 32, 2048
    copies = 2 * rows * HEADS * before * WIDTH * 4  # bytes of each row's keys and values: 8 MB
    assert peak(rows, 64, before, prompts=prompts) - peak(rows, 64) < copies / 2
