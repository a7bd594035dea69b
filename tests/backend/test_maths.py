"""Sums of exponentials, on a CPU by blocks."""

import mlx.core as mx
import numpy as np
import pytest

from grpo.backend.maths import logsumexp, logsumexp_and_softmax


def exact(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    highest = x.max(axis=-1, keepdims=True)
    return (np.log(np.exp(x - highest).sum(axis=-1, keepdims=True)) + highest)[..., 0]


@pytest.mark.parametrize("shape", [(5,), (2, 7), (3, 1), (2, 3, 300), (4, 97)])
def test_logsumexp_and_softmax_are_numpy_s(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 3
    total, shares = logsumexp_and_softmax(mx.array(x))
    np.testing.assert_allclose(np.array(total), exact(x), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.array(shares), np.exp(x - exact(x)[..., None]), rtol=3e-6)


def test_the_sum_of_a_large_vocabulary_keeps_its_precision() -> None:
    x = np.random.default_rng(0).normal(size=(4, 151_936)).astype(np.float32) * 3
    np.testing.assert_allclose(np.array(logsumexp(mx.array(x))), exact(x), atol=5e-6, rtol=0)


def test_the_gradient_is_the_softmax() -> None:
    x = mx.array(np.random.default_rng(0).normal(size=(3, 30)), mx.float32)
    slopes = mx.grad(lambda x: logsumexp(x).sum())(x)
    np.testing.assert_allclose(np.array(slopes), np.array(mx.softmax(x, axis=-1)), rtol=3e-6)
