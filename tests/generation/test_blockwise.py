"""The draw of a token by blocks: the stated distribution, its edges, and nothing but the row's own weights and key."""

import math

import mlx.core as mx
import numpy as np
import pytest

from grpo.backend.maths import equal_blocks, logsumexp_and_powers
from grpo.backend.random import derive_key
from grpo.generation import blockwise
from grpo.generation.blockwise import drawn_by_blocks
from grpo.generation.sampling import Sampling, TokenSampler

KEY = derive_key(0, "blocks")
SIZES = [1, 2, 3, 4, 7, 30, 64, 97, 300]
"""One token, primes (a single block), squares, and products of unlike numbers."""


ZEROS = {
    "block 0": (1, 117_368_865), "block 1": (2, 2_793_732_896),
    "first of a block": (1, 102_036_636), "second of a block": (2, 2_562_744_651),
}  # fmt: skip
"""Keys, found by search, that make the first, second, third or last of four uniform numbers zero: those of 4 tokens."""


def by_logits(logits: np.ndarray, keys: mx.array) -> np.ndarray:
    """Tokens for `[N, V]` logits and `[N, 2]` keys."""
    _, powers, sums = logsumexp_and_powers(mx.array(logits, mx.float32))
    return np.array(drawn_by_blocks(powers, sums, keys))


def by_hand(weights: np.ndarray, key: mx.array) -> int:
    """The same of one row in float64, from the uniform numbers: the least wait of a block, then inside it."""
    blocks = weights.reshape(equal_blocks(len(weights)), -1)
    count = sum(blocks.shape)
    uniform = np.array(mx.random.uniform(shape=(count,), key=key)).astype(np.float64) + 2.0**-33
    waits = -np.log1p(-uniform)
    block = int(np.argmax(blocks.sum(axis=1) / waits[: len(blocks)]))
    return block * blocks.shape[1] + int(np.argmax(blocks[block] / waits[len(blocks) :]))


@pytest.mark.parametrize(
    ("size", "blocks"), [(1, 1), (2, 1), (7, 1), (30, 5), (64, 8), (512, 16), (50_257, 29), (151_936, 128)]
)
def test_blocks_are_equal_and_about_as_many_as_long(size: int, blocks: int) -> None:
    assert equal_blocks(size) == blocks


@pytest.mark.parametrize("size", SIZES)
def test_draws_are_those_by_hand(size: int) -> None:
    logits = np.random.default_rng(size).normal(size=(100, size)).astype(np.float32) * 2
    keys = mx.random.split(KEY, 100)
    wanted = [by_hand(np.exp(row.astype(np.float64)), key) for row, key in zip(logits, keys, strict=True)]
    np.testing.assert_array_equal(by_logits(logits, keys), wanted)


@pytest.mark.parametrize("size", SIZES)
def test_draws_follow_the_softmax(size: int) -> None:
    rows = 20_000
    logits = np.random.default_rng(size).normal(size=size).astype(np.float32)
    counts = np.bincount(by_logits(np.broadcast_to(logits, (rows, size)), mx.random.split(KEY, rows)), minlength=size)
    wanted = np.exp(logits.astype(np.float64))
    wanted *= rows / wanted.sum()
    chi_squared = ((counts - wanted) ** 2 / wanted).sum()
    freedom = size - 1
    assert chi_squared <= freedom + 3.1 * math.sqrt(2 * freedom) + 6  # by chance less than once in a thousand keys


def test_a_block_and_the_token_in_it_are_drawn_independently() -> None:
    """A number that served twice would leave some pairs of block and place out."""
    rows, side = 20_000, 4
    tokens = by_logits(np.zeros((rows, side * side), np.float32), mx.random.split(KEY, rows))
    pairs = np.bincount(tokens, minlength=side * side)
    assert ((pairs - rows / 16) ** 2 / (rows / 16)).sum() < 37.7  # 15 degrees of freedom, once in a thousand


def test_neighbouring_places_of_a_row_are_drawn_independently() -> None:
    """The key of a place is the row's and the place's number added up."""
    rows, size = 20_000, 4
    keys = derive_key(1, "row") + mx.stack([mx.zeros(rows, mx.uint32), mx.arange(rows, dtype=mx.uint32)], axis=1)
    tokens = by_logits(np.zeros((rows, size), np.float32), keys)
    pairs = np.bincount(tokens[:-1] * size + tokens[1:], minlength=16)
    assert ((pairs - rows / 16) ** 2 / (rows / 16)).sum() < 37.7


@pytest.mark.parametrize("size", [4, 7, 300])
@pytest.mark.parametrize("only", [0, 2, -1])
@pytest.mark.parametrize("others", [-math.inf, -1e4])
def test_the_only_token_is_always_drawn(size: int, only: int, others: float) -> None:
    logits = np.full((500, size), others, np.float32)
    logits[:, only] = 1e4
    assert set(by_logits(logits, mx.random.split(KEY, 500))) == {only % size}


@pytest.mark.parametrize("size", [4, 7, 300])
def test_impossible_tokens_are_never_drawn(size: int) -> None:
    random = np.random.default_rng(size)
    logits = random.normal(size=(5_000, size)).astype(np.float32)
    possible = random.random((5_000, size)) < 0.3
    possible[np.arange(5_000), random.integers(size, size=5_000)] = True
    drawn = by_logits(np.where(possible, logits, -math.inf), mx.random.split(KEY, 5_000))
    assert possible[np.arange(5_000), drawn].all()


@pytest.mark.parametrize("key", ZEROS.values(), ids=ZEROS)
@pytest.mark.parametrize("only", range(4))
def test_a_number_of_zero_draws_what_is_possible(key: tuple[int, int], only: int) -> None:
    logits = np.full((1, 4), -math.inf, np.float32)
    logits[:, only] = 0
    assert by_logits(logits, mx.array([key], mx.uint32)).tolist() == [only]


def test_a_number_of_zero_is_the_shortest_wait() -> None:
    """So a probability of 1e-8 is drawn, which is less than the step of a uniform number next to one."""
    rare = np.log(np.array([[1e-8, 1e-12, 1.0, 1.0]]))
    assert by_logits(rare, mx.array([ZEROS["block 0"]], mx.uint32)).tolist() == [0]


@pytest.mark.parametrize("only", range(4))
def test_the_greatest_uniform_numbers_draw_what_is_possible(only: int, monkeypatch) -> None:
    monkeypatch.setattr(mx.random, "uniform", lambda low, high, shape, key: mx.full(shape, 1 - 2**-24) + low)
    logits = np.full((2, 4), -math.inf, np.float32)
    logits[:, only] = 0
    assert by_logits(logits, mx.random.split(KEY, 2)).tolist() == [only, only]


@pytest.mark.parametrize("size", [7, 300, 512])
def test_a_row_draws_the_same_beside_any_others(size: int) -> None:
    logits = np.random.default_rng(0).normal(size=(64, size)).astype(np.float32) * 3
    keys = mx.random.split(KEY, 64)
    total, _, sums = logsumexp_and_powers(mx.array(logits))
    together = by_logits(logits, keys)
    for rows in ([0], [5, 3], [63, 1, 2, 7, 9], range(1, 64)):
        alone, _, block_sums = logsumexp_and_powers(mx.array(logits[list(rows)]))
        taken = mx.array(list(rows))
        assert mx.array_equal(alone, total[taken]).item()
        assert mx.array_equal(block_sums, sums[taken]).item()
        np.testing.assert_array_equal(by_logits(logits[list(rows)], keys[taken]), together[list(rows)])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.8, min_tokens=3, repetition_penalty=1.3)], ids=str)
@pytest.mark.parametrize("size", [97, 300])
def test_a_wide_step_draws_what_narrow_steps_draw(sampling: Sampling, size: int) -> None:
    slots, width = 3, 5
    logits = mx.array(np.random.default_rng(1).normal(size=(slots, width, size)) * 2, mx.float32)
    samplers = [TokenSampler(sampling, [1, 2], slots, size) for _ in range(2)]
    for sampler in samplers:
        sampler.admit(range(slots), list(mx.random.split(KEY, slots)), [[4, 5]] * slots)
    narrow = [samplers[0].draw(logits[:, w], mx.full(slots, w), True) for w in range(width)]
    # What is fed at a place was drawn at the place before: the first of them stands in the prompt already.
    fed = mx.stack([mx.full(slots, 5, mx.uint32), *(drawn.tokens for drawn in narrow[:-1])], axis=1)
    wide = samplers[1].draw_wide(logits, fed, mx.zeros(slots, mx.int32), True)
    for name in ("tokens", "logprobs") + (("sampler_logprobs",) if sampling.reshaped else ()):
        one_by_one = mx.stack([getattr(drawn, name) for drawn in narrow], axis=1)
        assert mx.array_equal(getattr(wide, name).reshape(slots, width), one_by_one).item(), name


def test_numbers_that_are_none_draw_a_token_of_the_vocabulary() -> None:
    """A run whose logits are NaN is stopped elsewhere, by its logprobs: the draw must stay in bounds until then."""
    tokens = by_logits(np.full((3, 97), np.nan, np.float32), mx.random.split(KEY, 3))
    assert (tokens < 97).all()


def test_half_a_step_is_added_and_no_more() -> None:
    assert blockwise.LEAST == 0.5 / 2**32
    waits = np.array(blockwise._waits(mx.random.split(KEY, 100_000), 4))
    assert 0 < waits.min() < 1e-4
    assert waits.max() <= 17
    assert abs(waits.mean() - 1) < 0.01


@pytest.mark.parametrize(("place", "key"), list(enumerate(ZEROS.values())))
def test_the_keys_of_zeros_make_zeros(place: int, key: tuple[int, int]) -> None:
    assert mx.random.uniform(shape=(4,), key=mx.array(key, mx.uint32))[place].item() == 0
