"""Rows that have to go through the model before they decode enter together, where that stalls others."""

from types import SimpleNamespace

import pytest
from ways import LONG, asked, finish, generator_of, sampled

from grpo.generation import seats
from grpo.generation.sampling import Sampling


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that stands still unless a test moves it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(seats, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def begun(way: str):
    """An engine with one row that decodes for long, and two that wait to be extended."""
    engine = generator_of(way, 4).open()
    (busy,) = engine.submit(asked(LONG, sampling=Sampling(1.0, 2000, min_tokens=1000)))
    rows = engine.submit(asked(LONG, 1, n=2, sampling=Sampling(1.0, 300)))
    while any(row.finish_reason is None for row in rows):
        engine.step()
    return engine, busy, rows


def test_they_wait_until_they_have_waited_as_long_as_the_others_would_be_stalled(clock) -> None:
    engine, _, rows = begun("overlapping steps")
    engine._run.seats._stall = 3.0
    for row in rows:
        engine.extend(row, [30, 31])
    for clock.now in (100.0, 101.4):
        engine.step()
        assert [row.state for row in rows] == ["queued", "queued"]
    clock.now = 101.5
    engine.step()
    engine.step()
    assert "queued" not in [row.state for row in rows]


def test_nobody_waits_where_steps_do_not_overlap_or_nothing_decodes(clock) -> None:
    engine, _, (row, _) = begun("joined layers")
    engine._run.seats._stall = 1e9
    engine.extend(row, [30])
    engine.step()
    assert row.state != "queued"
    engine, busy, (row, _) = begun("overlapping steps")
    engine.release(busy)
    engine._run.seats._stall = 1e9
    engine.extend(row, [30])
    engine.step()
    engine.step()
    assert row.state != "queued"


def test_when_they_enter_changes_no_token(monkeypatch) -> None:
    found = []
    for stall in (0.0, 1e9):
        engine, busy, rows = begun("overlapping steps")
        engine._run.seats._stall = stall
        for row in rows:
            engine.extend(row, [30, 31, 32])
        for _ in range(5):
            engine.step()
        engine.release(busy)
        finish(engine)
        found.append(sampled(rows))
    assert found[0] == found[1]
