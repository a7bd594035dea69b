"""One number of each row, as a GPU looks it up and as a CPU does."""

from __future__ import annotations

import mlx.core as mx
import pytest

from grpo.backend import maths


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32])
def test_a_gpus_way_gives_the_same_numbers_and_gradient(monkeypatch, dtype: mx.Dtype) -> None:
    logits = mx.random.normal((2, 3, 7), key=mx.random.key(0))
    tokens, slopes = mx.array([[0, 6, 3], [5, 1, 1]], dtype), mx.array([[1.0, -2.0, 0.5], [3.0, 0.0, 4.0]])

    def found() -> tuple[mx.array, mx.array]:
        values, gradient = mx.vjp(lambda x: maths.chosen(x, tokens), [logits], [slopes])
        return values[0], gradient[0]

    (expected, expected_gradient) = found()
    monkeypatch.setattr(maths, "on_gpu", lambda: True)
    values, gradient = found()
    assert mx.array_equal(values, expected)
    assert mx.array_equal(gradient, expected_gradient)
    assert gradient[0, 1].tolist() == [0, 0, 0, 0, 0, 0, -2]
