"""Attention in tiles: the gradients of plain attention, in memory that grows with the tokens."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from model.tiling import shrink_tiles

from grpo.model.attention import PromptKeysValues, attention
from grpo.model.sight import Causal, InLine, Masked, Sight

HEADS, GROUPS, WIDTH, VALUES = 2, 3, 8, 12  # of keys, of queries that share them, of keys and of values
SCALE = WIDTH**-0.5


@pytest.fixture(autouse=True, params=["kept", "computed again"])
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch, 8, 300, request.param == "kept")


def arrays(rows: int, length: int, prompts: int = 0, before: int = 0, sinks: bool = False) -> list[mx.array]:
    shapes = [(rows, HEADS * GROUPS, length, WIDTH), (rows, HEADS, length, WIDTH), (rows, HEADS, length, VALUES)]
    shapes += [(prompts, HEADS, before, width) for width in (WIDTH, VALUES)] if before else []
    shapes += [(HEADS * GROUPS,)] if sinks else []
    return [mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]


def plain(given: list[mx.array], sees: mx.array, index: mx.array | None, sinks: bool) -> mx.array:
    """By the book, in MLX's own operations: `sees` `[B, T, L + K]` bool."""
    queries, keys, values, *others = given
    if index is not None:
        keys, values = (
            mx.concatenate([own[index], more], axis=2) for own, more in zip(others, (keys, values), strict=False)
        )
    keys, values = (mx.repeat(array, GROUPS, axis=1) for array in (keys, values))
    scores = mx.where(sees[:, None], SCALE * queries @ keys.swapaxes(-1, -2), -mx.inf)
    if sinks:
        column = mx.broadcast_to(others[-1][:, None, None], (*scores.shape[:3], 1))
        return mx.softmax(mx.concatenate([column, scores], axis=-1), axis=-1)[..., 1:] @ values
    return mx.softmax(scores, axis=-1) @ values


def assert_the_same(
    given: list[mx.array], sight: Sight, sees: mx.array, index: mx.array | None = None, sinks: bool = False
) -> None:
    """What comes out, and the gradient of each array, to a millionth of the largest number."""
    rows, _, length, _ = given[0].shape
    slopes = mx.random.normal((rows, HEADS * GROUPS, length, VALUES), key=mx.random.key(9))

    def tiled(*given: mx.array) -> mx.array:
        prompts = None if index is None else PromptKeysValues(given[3], given[4], index)
        return attention(*given[:3], SCALE, sight, prompts, given[-1] if sinks else None)

    pair: Any = [
        mx.vjp(function, given, [slopes]) for function in (tiled, lambda *a: plain(list(a), sees, index, sinks))
    ]
    found, expected = ([*out, *gradients] for out, gradients in pair)
    bound = 4e-6 if sinks else 1e-6  # a sink's gradient is a sum over all rows
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mx.abs(mine - theirs).max().item() <= bound * mx.abs(theirs).max().item()


def before(queries: mx.array, keys: mx.array, window: int | None) -> mx.array:
    ahead = queries[..., :, None] - keys[..., None, :]
    return (ahead >= 0) & (ahead < window) if window else ahead >= 0


@pytest.mark.parametrize("window", [None, 2, 3, 9, 40])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 9, 37])
def test_each_token_sees_what_stands_before_it(length: int, window: int | None) -> None:
    places = mx.arange(length)
    sees = mx.broadcast_to(before(places, places, window)[None], (3, length, length))
    assert_the_same(arrays(3, length), Causal(window), sees)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("lengths", [[7], [13, 1, 6]])
@pytest.mark.parametrize("length", [1, 4, 9])
def test_rows_see_their_prompts_which_are_shared(length: int, lengths: list[int], window: int | None) -> None:
    index = mx.array([0, 2, 2, 1, 0]) if len(lengths) > 1 else mx.zeros((5,), mx.int32)
    longest, begins = max(lengths), mx.array(lengths)[index][:, None]
    nowhere = 1000
    places = mx.where(mx.arange(longest) < begins, mx.arange(longest), nowhere)
    own = begins + mx.arange(length)
    sees = before(own, mx.concatenate([places, own], axis=1), window)
    given = arrays(5, length, len(lengths), longest)
    assert_the_same(given, Causal(window, begins[:, 0]), sees, index)


def test_a_prompt_that_no_row_goes_on_from_has_no_gradient() -> None:
    given, index = arrays(2, 5, 3, 4), mx.array([2, 0])

    def loss(*given: mx.array) -> mx.array:
        return attention(
            *given[:3], SCALE, Causal(None, mx.array([4, 4])), PromptKeysValues(given[3], given[4], index)
        ).sum()

    of_keys, of_values = mx.grad(loss, [3, 4])(*given)
    assert not of_keys[1].any()
    assert not of_values[1].any()
    assert of_values[0].any()


@pytest.mark.parametrize("sinks", [False, True])
def test_without_a_gradient_it_is_the_same(sinks: bool) -> None:
    """Prompts without lengths are seen whole."""
    given, index = arrays(3, 9, 2, 5, sinks=sinks), mx.array([1, 0, 0])
    prompts, sink = PromptKeysValues(given[3], given[4], index), given[5] if sinks else None
    lengths = mx.array([5, 5, 5])
    expected = attention(*given[:3], SCALE, Causal(None, lengths), prompts, sink)
    found = attention(*given[:3], SCALE, Causal(), prompts, sink, gradient=False)
    assert mx.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_sinks_take_weight_and_give_nothing(shared: bool) -> None:
    index, places = mx.array([1, 0, 0]), mx.arange(9)
    sees = mx.broadcast_to(before(places, places, None)[None], (3, 9, 9))
    if not shared:
        assert_the_same(arrays(3, 9, sinks=True), Causal(), sees, sinks=True)
        return
    sees = mx.concatenate([mx.ones((3, 9, 5), mx.bool_), sees], axis=-1)
    sight = Causal(None, mx.array([5, 5, 5]))
    assert_the_same(arrays(3, 9, 2, 5, sinks=True), sight, sees, index, sinks=True)


@pytest.mark.parametrize("window", [None, 3])
def test_in_a_line_each_completion_is_alone_with_its_prompt(window: int | None) -> None:
    prompts = mx.array([[1] * 9 + [2] * 4, [1] * 5 + [0] * 8])
    rows = mx.array([[0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 3, 3, 3], [0, 0, 4, 4, 4] + [0] * 8])
    positions = mx.array([[0, 1, 2, 3, 4, 5, 3, 4, 5, 0, 1, 2, 3], [0, 1, 2, 3, 4] + [0] * 8])
    sees = before(mx.arange(13), mx.arange(13), None) & (prompts[:, :, None] == prompts[:, None])
    sees = sees & ((rows[:, None] == 0) | (rows[:, None] == rows[:, :, None]))
    if window:
        sees = sees & (positions[:, :, None] - positions[:, None] < window)
    assert_the_same(arrays(2, 13), InLine(positions, prompts, rows, window), sees)


@pytest.mark.parametrize("each", [True, False])
def test_a_mask_of_booleans_may_say_anything(each: bool) -> None:
    sees = mx.random.bernoulli(0.5, (2 if each else 1, 9, 9), mx.random.key(4)) | (mx.eye(9) > 0)
    assert_the_same(arrays(2, 9), Masked(sees), mx.broadcast_to(sees, (2, 9, 9)))


def test_scores_that_would_overflow_do_not() -> None:
    given = [array * 100 if i < 2 else array for i, array in enumerate(arrays(2, 9))]
    found = mx.grad(lambda *given: attention(*given, SCALE, Causal()).sum(), [0, 1, 2])(*given)
    assert all(mx.isfinite(array).all().item() for array in found)


def test_halves_give_halves() -> None:
    given = [array.astype(mx.bfloat16) for array in arrays(2, 9)]
    out, gradients = mx.value_and_grad(lambda *given: attention(*given, SCALE, Causal()).sum(), [0, 1, 2])(*given)
    assert {array.dtype for array in (out, *gradients)} == {mx.bfloat16}
    exact = attention(*(array.astype(mx.float32) for array in given), SCALE, Causal())
    assert mx.abs(attention(*given, SCALE, Causal()).astype(mx.float32) - exact).max().item() < 0.05
