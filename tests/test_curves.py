"""Intervals over seeds, by hand."""

from __future__ import annotations

import pytest
from benchmark_scripts import script


@pytest.fixture(scope="module")
def module():
    with script("curves") as module:
        yield module


def test_the_interval_is_students(module) -> None:
    assert module.mean_and_half_width([50.0]) == (50.0, None)
    mean, half = module.mean_and_half_width([80.0, 90.0, 100.0])
    assert mean == 90.0
    assert half == pytest.approx(4.303 * 10 / 3**0.5)  # deviation 10, three seeds


def test_a_cell_is_in_per_cent(module) -> None:
    assert module.cell([0.5]) == "50.0"
    assert module.cell([0.8, 0.9, 1.0]) == "90.0 ± 24.8"
