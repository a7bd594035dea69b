"""Pools of tasks by their solve rates: which pool, how often each is drawn, and what is kept of them."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest

from grpo.config import CurriculumConfig
from grpo.data.pools import CHUNK, LEFT_OUT, POOLS, Pools

DEFAULT = CurriculumConfig()


def pools(size: int, rates: dict[int, float], cfg: CurriculumConfig = DEFAULT) -> Pools:
    made = Pools(size, cfg)
    for index, rate in rates.items():
        made.put(index, rate)
    return made


@pytest.mark.parametrize(
    ("rate", "pool"),
    [(0.0, "hard"), (0.1, "hard"), (1 / 8, "normal"), (0.9, "normal"), (15 / 16, "easy"), (1.0, "easy")],
)
def test_thresholds_are_of_the_pool_below(rate: float, pool: str) -> None:
    made = pools(2, {1: rate})
    assert [made.pool(0), made.pool(1)] == ["unseen", pool]
    assert made.sizes() == {name: int(name == "unseen") + int(name == pool) for name in POOLS}


@pytest.mark.parametrize(("of", "edge"), [(3, 0.3), (1, 0.1), (7, 0.7)])
def test_a_rate_at_a_threshold_that_has_no_exact_float_is_not_above_it(of: int, edge: float) -> None:
    cfg = CurriculumConfig(hard_threshold=edge, easy_threshold=edge)
    assert pools(1, {0: of / 10}, cfg).pool(0) == "hard"


def test_draws_follow_the_weights_of_single_tasks() -> None:
    """χ² of 100,000 draws over ten tasks in all pools: 9 degrees of freedom, 27.88 at a chance of 0.001."""
    rates = {0: 0.0, 1: 0.1, 2: 0.1, 3: 0.2, 4: 0.9, 5: 0.95, 6: 1.0, 7: LEFT_OUT}
    made = pools(11, rates)
    weights = [0.1, 0.1, 0.1, 1, 1, 0.2, 0.2, 0, 1, 1, 1]
    generator = random.Random(0)
    drawn = Counter(made.draw(generator.random()) for _ in range(100_000))
    expected = [100_000 * weight / sum(weights) for weight in weights]
    assert drawn[7] == 0
    assert sum((drawn[i] - e) ** 2 / e for i, e in enumerate(expected) if e) < 27.88


def test_draws_reach_across_chunks_by_weight() -> None:
    """Three chunks, of which the last is short; the weights of the pools, 255 degrees of freedom merged to 4."""
    size = 2 * CHUNK + 10
    made = pools(size, {i: 0.0 for i in range(CHUNK)} | {i: 0.5 for i in range(2 * CHUNK, size)})
    weights = {"hard": 0.1 * CHUNK, "unseen": CHUNK, "normal": 10}
    drawn = Counter(made.pool(made.draw((k + 0.5) / 5_000)) for k in range(5_000))
    total = sum(weights.values())
    assert {name: drawn[name] / 5_000 for name in weights} == pytest.approx(
        {name: weight / total for name, weight in weights.items()}, abs=4e-4
    )


def test_weight_0_leaves_a_pool_out_and_nothing_else_leaves_none() -> None:
    made = pools(3, {0: 1.0, 1: 0.5}, CurriculumConfig(easy=0, normal=1, unseen=0))
    assert {made.draw(place) for place in (0.0, 0.5, 1 - 2**-53)} == {1}
    made.put(1, 1.0)
    assert made.draw(0.5) is None


def test_the_ends_of_the_line_are_tasks_with_a_weight() -> None:
    made = pools(CHUNK + 2, {0: LEFT_OUT, CHUNK + 1: LEFT_OUT})
    assert (made.draw(0.0), made.draw(1 - 2**-53)) == (1, CHUNK)


def test_a_sum_that_was_rounded_down_still_ends_in_a_task() -> None:
    """Ten times 0.1 are 1, and added up one by one 0.9999999999999999."""
    assert pools(10, dict.fromkeys(range(10), 0.0)).draw(1 - 2**-53) == 9


def test_each_task_of_a_later_chunk_has_its_place() -> None:
    size = 3 * CHUNK
    assert [Pools(size, DEFAULT).draw((i + 0.5) / size) for i in range(CHUNK - 2, size, 97)] == [
        *range(CHUNK - 2, size, 97)
    ]


def test_what_was_packed_draws_the_same_whatever_the_order_it_came_in() -> None:
    rates = {7: 1 / 3, 2000: 1.0, 2001: 0.0, 5: LEFT_OUT, 1023: 0.7}
    made = pools(3000, {7: 0.9} | rates)
    made.packed()
    made.put(7, 1 / 3)
    other = Pools(3000, DEFAULT)
    other.put(9, 1.0)  # what it had before goes
    other.load(json.loads(json.dumps(made.packed())))
    places = [k / 997 for k in range(997)]
    assert [made.draw(place) for place in places] == [other.draw(place) for place in places]
    assert [made.rate(i) for i in range(3000)] == [other.rate(i) for i in range(3000)]
    assert (made.sizes(), made.left_out) == (other.sizes(), other.left_out) == (pools(3000, rates).sizes(), 1)
    assert made.packed() == other.packed() == pools(3000, rates).packed()
    assert other.pool(9) == "unseen"


def test_beginning_with_rates_is_putting_each() -> None:
    rates = {7: 1 / 3, 2000: 1.0, 2001: 0.0, 1023: 0.25, 1024: 0.75, 2999: 0.76}
    cfg = CurriculumConfig(hard_threshold=0.1, easy_threshold=1 / 3)
    put, begun = pools(3000, {5: LEFT_OUT} | rates, cfg), Pools(3000, cfg)
    begun.put(5, 1.0)
    begun.begin(np.array([rates.get(i, np.nan) for i in range(3000)]))
    begun.put(5, LEFT_OUT)
    assert (begun.sizes(), begun.left_out, begun.packed()) == (put.sizes(), put.left_out, put.packed())
    assert [begun.draw(k / 997) for k in range(997)] == [put.draw(k / 997) for k in range(997)]


def test_the_histogram_has_tenths_and_a_rate_between_two_is_in_the_higher() -> None:
    rates = [0, 0.05, 0.1, 0.3, 0.6, 0.7, 0.95, 1]
    made = pools(12, {n: rate for n, rate in enumerate(rates)} | {9: LEFT_OUT})
    assert made.histogram() == [2, 1, 0, 1, 0, 0, 1, 1, 0, 2]


def test_what_was_packed_stays_as_it_was() -> None:
    made = pools(4, {0: 0.5})
    before = made.packed()
    kept = list(before)
    made.put(1, 1.0)
    assert made.packed() != before == kept


def test_a_million_tasks_take_few_bytes_and_only_what_changed_is_packed() -> None:
    made = pools(1_000_000, {i * 31: 0.125 * (i % 9) for i in range(32_000)})
    first = made.packed()
    made.put(5, 0.5)
    second = made.packed()
    assert [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a is not b] == [0]
    assert sum(map(len, second)) < 1_000_000
