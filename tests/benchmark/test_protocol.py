"""How sides are measured: turns, and ratios with intervals that say better whichever way a unit counts."""

import math
from itertools import count

import pytest

from grpo.benchmark.protocol import Measurement, Side, alternate, interval


def side(name: str, speeds: list[float], gigabytes: list[float], order: list[str], against: str | None = None) -> Side:
    turn = count()

    def run() -> dict[str, float]:
        order.append(name)
        number = next(turn)
        return {"tok/s": speeds[number], "GB": gigabytes[number]}

    return Side(name, run, against)


def test_sides_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []
    rows = alternate(
        "case",
        [side("peer", [1, 10, 20, 30], [9, 4, 4, 4], order), side("grpo", [2, 40, 50, 60], [9, 1, 1, 1], order)],
        runs=3,
    )
    assert order == ["peer", "grpo", "peer", "grpo", "grpo", "peer", "peer", "grpo"]  # every second turn backwards
    by = {(row.side, row.unit): row for row in rows}
    assert by["peer", "tok/s"].mean == 20
    assert by["peer", "tok/s"].sd == 10
    assert by["peer", "tok/s"].spread == 1  # (30 - 10) / 20
    assert by["peer", "tok/s"].cold == 1
    assert by["peer", "tok/s"].ratio is None
    assert by["grpo", "tok/s"].ratios == (4, 2.5, 2)  # turn by turn
    assert by["grpo", "tok/s"].ratio == 2.5
    assert by["grpo", "GB"].ratio == 4  # less memory is better


def test_a_side_may_be_held_against_another_than_the_first() -> None:
    sides = [side("a", [1, 1], [1, 1], []), side("b", [1, 2], [1, 1], []), side("c", [1, 8], [1, 1], [], against="b")]
    ratios = {row.side: row.ratio for row in alternate("case", sides, 1) if row.unit == "tok/s"}
    assert ratios == {"a": None, "b": 2, "c": 4}


def test_nothing_is_so_many_times_better_than_nothing() -> None:
    rows = alternate("case", [side("a", [1, 1], [0, 0], []), side("b", [1, 1], [0, 2], [])], 1)
    assert {(row.side, row.unit): row.ratio for row in rows}["b", "GB"] is None


def test_only_the_first_side_is_begun_when_the_time_is_over() -> None:
    order: list[str] = []
    sides = [side("a", [1, 1], [1, 1], order), side("b", [1, 1], [1, 1], order)]
    assert {row.side for row in alternate("case", sides, 1, seconds=-1)} == {"a"}
    assert order == ["a", "a"]


def test_the_interval_of_a_median() -> None:
    # Five values: each end is passed by the median with probability 2 × 1/32.
    assert interval([5, 1, 4, 2, 3]) == (1, 5)
    # Eight: without one at each end it is missed with probability 2 × 9/256 = 7 %, without two with 29 %.
    assert interval(range(8)) == (1, 6)
    assert interval(range(20)) == (5, 14)
    assert interval([2.0]) == (2, 2)


@pytest.mark.parametrize("n", range(5, 40))
def test_the_interval_covers_as_much_as_it_says_and_no_end_can_be_cut_off(n: int) -> None:
    low, high = interval(range(n))
    assert low + high == n - 1

    def missed(left: int) -> float:
        return 2 * sum(math.comb(n, i) for i in range(left + 1)) / 2**n

    assert missed(int(low)) <= 0.1 < missed(int(low) + 1)


def test_a_single_run_has_no_spread_and_small_numbers_are_seen() -> None:
    once, twice = (alternate("case", [side("peer", [1, 10, 20], [9, 4e-4, 4e-4], [])], runs) for runs in (1, 2))
    assert "±" not in once[0].line()
    assert "± 7.071" in twice[0].line()  # √50
    assert "spread  66.7 %" in twice[0].line()
    assert "0.0004" in once[1].line()


def test_a_row_s_line_has_its_ratio_with_the_interval() -> None:
    row = Measurement("case", "grpo", "tok/s", (1.0,) * 5, 1.0, (1.0, 2.0, 3.0, 4.0, 5.0))
    assert row.line().endswith("3.000 × (1.000 to 5.000)")
    once = Measurement("case", "grpo", "tok/s", (1.0,), 1.0, (3.0,))
    assert once.line().endswith("3.000 ×")
