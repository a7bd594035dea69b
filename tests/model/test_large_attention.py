"""Attention on CUDA whose backward pass would have too large a workspace: it is computed some heads at a time."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from grpo.backend import cuda
from grpo.model import attending, mlxlm


def arrays(heads: int = 8, of_keys: int = 4, length: int = 6, width: int = 8) -> list[mx.array]:
    shapes = [(2, heads, length, width), (2, of_keys, length, width), (2, of_keys, length, width)]
    return [mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]


def with_gradients(q: mx.array, k: mx.array, v: mx.array, mask: Any, sinks: mx.array | None) -> list[mx.array]:
    def out(*given: mx.array) -> mx.array:
        return attending.mlx_lms(*given[:3], 0.3, mask, *given[3:])

    given = [q, k, v, *([] if sinks is None else [sinks])]
    (found,), slopes = mx.vjp(lambda *a: [out(*a)], given, [mx.random.normal(q.shape, key=mx.random.key(9))])
    return [found, *slopes]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many heads each call of MLX's attention was given."""
    seen: list[int] = []
    genuine = mlxlm.scaled_dot_product_attention

    def counted(queries: mx.array, *given: Any, **named: Any) -> mx.array:
        seen.append(queries.shape[1])
        return genuine(queries, *given, **named)

    monkeypatch.setattr(mlxlm, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(cuda, "available", lambda: True)
    return seen


MASK = mx.where(mx.tri(6, dtype=mx.bool_), 0.0, -1e9)


@pytest.mark.parametrize("mask", ["causal", None, MASK, MASK[None, None]], ids=["causal", "none", "2 axes", "4 axes"])
@pytest.mark.parametrize("sinks", [None, mx.arange(8) / 4.0], ids=["", "sinks"])
@pytest.mark.parametrize(("most", "heads"), [(768, 8), (767, 4), (384, 4), (383, 2), (1, 2)])
def test_some_heads_at_a_time_give_the_same(
    mask: Any, sinks: Any, most: int, heads: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = with_gradients(*arrays(), mask, sinks)
    assert calls == [8]
    calls.clear()
    monkeypatch.setattr(attending, "CUDA_QUERIES", most)
    parts = with_gradients(*arrays(), mask, sinks)
    assert set(calls) == {heads}, "each call has as many heads, and all that share keys"
    assert sum(calls) == 8
    for one, other in zip(whole, parts, strict=True):
        assert mx.allclose(one, other, rtol=1e-6, atol=1e-6)


def test_masks_of_heads_and_other_machines_have_one_call(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending, "CUDA_QUERIES", 1)
    of_heads = mx.broadcast_to(MASK, (8, 6, 6)) * mx.arange(8).reshape(8, 1, 1)
    attending.mlx_lms(*arrays(), 0.3, of_heads)
    monkeypatch.setattr(cuda, "available", lambda: False)
    attending.mlx_lms(*arrays(), 0.3, "causal")
    assert calls == [8, 8]
