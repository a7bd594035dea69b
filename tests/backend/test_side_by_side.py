"""Lanes: the same results in the same order, whatever their number; nothing goes on after an error."""

import time

import mlx.core as mx
import pytest

from grpo.backend import lanes
from grpo.backend.lanes import lanes_for, side_by_side
from grpo.backend.ranks import Ranks

WEIGHTS = mx.random.normal((32, 32), key=mx.random.key(0))


def built(x: mx.array) -> tuple[mx.array, mx.array]:
    y = mx.softmax(x @ WEIGHTS, axis=-1)
    return y, y.sum()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_results_come_in_order_and_are_the_same_to_the_bit(number: int) -> None:
    items = list(mx.random.split(mx.random.key(1), 7))
    made = list(side_by_side(lambda key: built(mx.random.normal((8, 32), key=key)), items, number))
    alone = [built(mx.random.normal((8, 32), key=key)) for key in items]
    assert len(made) == 7
    assert all(
        mx.array_equal(a, b) for pair, own in zip(made, alone, strict=True) for a, b in zip(pair, own, strict=True)
    )


def test_each_lane_has_a_stream_of_its_own_and_no_more_are_under_way() -> None:
    streams, read = [], []

    def build(number: int) -> mx.array:
        streams.append(mx.default_stream(mx.cpu))
        assert number - len(read) < 2  # of two lanes: what is built is read two items later at the latest
        return mx.array(number) + 1

    former = mx.default_stream(mx.cpu)
    for made in side_by_side(build, range(6), 2):
        read.append(made.item())
    assert read == [1, 2, 3, 4, 5, 6]
    assert len(set(map(str, streams))) == 2
    assert former not in streams
    assert mx.default_stream(mx.cpu) == former


def test_an_error_in_one_lane_is_raised_and_the_others_are_waited_for(monkeypatch) -> None:
    evaluated = []
    evaluate = mx.eval

    def failing(*held) -> None:
        if held == ([bad],):
            raise RuntimeError("out of memory")
        if held == ([good],):
            time.sleep(0.1)  # still under way when the other has failed
        evaluate(*held)
        evaluated.append(held)

    bad, good = object(), object()
    monkeypatch.setattr(lanes.mx, "eval", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(side_by_side(lambda item: item, [bad, good], 2))
    assert ([good],) in evaluated


def test_lanes_are_no_more_than_parts_or_cores_and_one_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(lanes, "cpu_cores", lambda: 8)
    ranks = Ranks()
    assert (lanes_for(3), lanes_for(20), lanes_for(0)) == (3, 8, 1)
    ranks.neighbours = 4
    assert (lanes_for(20, ranks), lanes_for(1, ranks)) == (2, 1)
    ranks.neighbours = 16
    assert lanes_for(20, ranks) == 1
    monkeypatch.setattr(lanes, "on_gpu", lambda: True)
    assert lanes_for(20) == 1


def test_the_cores_are_shared_by_the_lanes_and_given_back(monkeypatch) -> None:
    threads = [6]
    monkeypatch.setattr(lanes.blas, "most_threads", lambda: threads[-1])
    entered = []
    genuine = lanes.blas.threads
    monkeypatch.setattr(lanes.blas, "threads", lambda number: (entered.append(number), genuine(number))[1])
    list(side_by_side(lambda item: item + 1, [mx.array(0)] * 3, 3))
    assert entered == [2]
