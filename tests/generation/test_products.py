"""Rows of a product are the same to the bit, however many there are."""

import mlx.core as mx
import pytest

from grpo.generation.products import few_rows, product

on_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU rounds by its own rules")


@on_cpu
@pytest.mark.parametrize("columns", [8, 12, 16, 20, 24, 64])
def test_rows_do_not_depend_on_how_many_there_are(columns: int) -> None:
    x, matrix = mx.random.normal((64, 256)), mx.random.normal((256, columns))
    expected = product(x, matrix)
    for rows in (1, 2, 3, 4, 7, 12, 16, 33):
        assert mx.array_equal(product(x[:rows], matrix), expected[:rows]), rows


@on_cpu
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 7, 8, 9])
def test_few_rows_do_not_depend_on_the_zeros_behind_a_sum(rows: int) -> None:
    few = few_rows(rows)
    assert rows % few == 0
    weights, values = mx.random.normal((1, few, 1024)) * (mx.arange(1024) < 250), mx.random.normal((1, 1024, 32))
    expected = weights @ values
    for length in (256, 320, 384, 512):
        assert mx.array_equal(weights[..., :length] @ values[:, :length], expected), length
