"""Settings drawn as `scripts/benchmarks/plan.py` draws them: the peak of a step is near its plan."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from benchmark_scripts import script

from grpo.backend import lanes


@pytest.fixture(scope="module")
def drawing() -> Iterator[ModuleType]:
    with script("plan") as module:
        yield module


@pytest.mark.slow
@pytest.mark.parametrize("number", [4, 7, 8, 16, 17])
def test_a_peak_is_near_its_plan(drawing: ModuleType, monkeypatch, number: int) -> None:
    """One lane, whose peak is nearly the same each time: two are planned as if both were at their peaks at once."""
    monkeypatch.setattr(lanes, "cpu_cores", lambda: 1)
    found = drawing.measured(drawing.drawn(number))
    assert found["over"] == pytest.approx(1, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.9, 0.6])
def test_a_limit_holds(drawing: ModuleType, share: float) -> None:
    """With as many lanes as there are."""
    setting = drawing.drawn(16) | {"limit": share, "checkpointing": "auto", "micro_batch_tokens": "auto"}
    found = drawing.measured(setting)
    assert found["peak"] <= 1.02 * found["limit"]
    assert found["planned"] <= found["limit"]


def test_the_same_number_draws_the_same_setting(drawing: ModuleType) -> None:
    assert drawing.drawn(3) == drawing.drawn(3) != drawing.drawn(4)
