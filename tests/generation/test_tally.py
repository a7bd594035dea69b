"""What the metrics of speculation say, by hand."""

import pytest

from grpo.generation.tally import DraftTally, speculation_metrics


def test_metrics_by_hand() -> None:
    tally = DraftTally()
    tally.add(1, rows=4, taken=4, seconds=1.0)
    tally.add(4, rows=4, taken=12, seconds=1.5, plain=1.0)
    metrics = speculation_metrics(tally.counts())
    assert metrics["speculation/accepted"] == 2.0  # three tokens a row at the wide step
    assert metrics["speculation/width"] == 2.5
    assert metrics["speculation/gain"] == pytest.approx((1 + 3) / 2.5)


def test_plain_decoding_gains_nothing() -> None:
    tally = DraftTally()
    tally.add(1, rows=4, taken=4, seconds=1.0)
    assert speculation_metrics(tally.counts()) == {
        "speculation/accepted": 0.0,
        "speculation/width": 1.0,
        "speculation/gain": 1.0,
    }


def test_a_gain_over_what_was_never_timed_is_not_told() -> None:
    tally = DraftTally()
    tally.add(1, rows=2, taken=2, seconds=1.0)
    tally.add(4, rows=2, taken=6, seconds=1.0)
    assert set(speculation_metrics(tally.counts())) == {"speculation/accepted", "speculation/width"}


def test_sums_of_processes_add_up() -> None:
    one, other = DraftTally(), DraftTally()
    one.add(2, rows=2, taken=4, seconds=1.0, plain=1.0)
    other.add(2, rows=6, taken=6, seconds=1.0, plain=1.0)
    counts = {name: value + other.counts()[name] for name, value in one.counts().items()}
    assert speculation_metrics(counts)["speculation/accepted"] == 0.25


def test_nothing_decoded_is_nothing_told() -> None:
    tally = DraftTally()
    tally.add(1, rows=0, taken=0, seconds=1.0)
    assert speculation_metrics(tally.counts()) == {}
    tally.add(1, rows=1, taken=1, seconds=1.0)
    tally.clear()
    assert speculation_metrics(tally.counts()) == {}
