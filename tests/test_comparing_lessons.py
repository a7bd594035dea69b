"""The script that compares how soon runs learn: its ratios and intervals by hand, and what counts as a rollout."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import inf
from pathlib import Path

import pytest
from benchmark_scripts import script


@pytest.fixture(scope="module")
def lessons():
    with script("lessons") as module:
        yield module


def made(lessons, arm: str, seed: int, steps: int, reached: bool = True):
    return lessons.Run("teacher", arm, seed, 0.9, reached, [0, steps], [0, 8 * steps], [0.3, 0.95], 1.0)


def test_the_interval_of_a_median(lessons) -> None:
    assert lessons.interval([0.5]) == (0.5, 0.5)
    low, high = lessons.interval([0.2, 0.4, 0.6, 0.8, 1.0])
    assert (low, high) == (0.2, 1.0)
    assert lessons.interval([0.4, 0.5, inf, inf, inf])[1] == inf


def test_the_summary_by_hand(lessons) -> None:
    runs = [made(lessons, "plain", seed, steps) for seed, steps in ((0, 20), (1, 40))]
    runs += [made(lessons, "taught", 0, 10), made(lessons, "taught", 1, 10), made(lessons, "taught", 2, 1)]
    lines = lessons.summary(runs).splitlines()
    assert lines[0] == "teacher: to an accuracy of 0.9; ratios are to plain"
    assert lines[-2] == "| plain | 2 | 30 | 240 | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) |"
    assert lines[-1] == "| taught | 2 | 10 | 80 | 0.38 (0.25 to 0.50) | 0.38 (0.25 to 0.50) |"  # no pair for seed 2
    assert "| plain | 2 | 30 | 240 | 3.00 (2.00 to 4.00)" in lessons.summary(runs, "taught")


def test_a_run_that_never_reached_the_target(lessons) -> None:
    """Infinitely many steps of its own; as what others are compared with, those that it made."""
    plain, never = made(lessons, "plain", 0, 20), made(lessons, "taught", 0, 80, reached=False)
    assert lessons.summary([plain, never]).splitlines()[-1] == (
        "| taught | 1 | inf | inf | inf (inf to inf) | inf (inf to inf) |"
    )
    assert "| plain | 1 | 20 | 160 | 0.25 (0.25 to 0.25)" in lessons.summary([plain, never], "taught")


def test_the_curves_by_hand(lessons) -> None:
    """Without a target: the difference is seed by seed, so that what seeds share does not count. Seed 2 has no pair."""

    def ran(arm: str, seed: int, *accuracy: float):
        return lessons.Run("agents", arm, seed, None, False, [0, 5], [0, 320], [*accuracy], 1.0)

    runs = [ran("environment", 0, 0.3, 0.8), ran("environment", 1, 0.4, 0.9), ran("environment", 2, 0.0, 0.0)]
    runs += [ran("agent", 1, 0.4, 0.92), ran("agent", 0, 0.3, 0.84)]
    assert lessons.summary(runs).splitlines() == [
        "agents: accuracy in percent",
        "",
        "| step | environment | agent | agent - environment |",
        "|---|---|---|---|",
        "| 0 | 35.0 ± 63.5 | 35.0 ± 63.5 | 0.0 ± 0.0 |",
        "| 5 | 85.0 ± 63.5 | 88.0 ± 50.8 | 3.0 ± 12.7 |",
        "| mean | 60.0 ± 63.5 | 61.5 ± 57.2 | 1.5 ± 6.4 |",
    ]


def test_without_a_target_all_steps_are_made(lessons, monkeypatch) -> None:
    seen = []

    def train(comparison, arm, seed, until=inf, keep=None):
        seen.append((comparison.measure, until))
        yield from ((0, 0, 0.5), (5, 320, 1.0), (10, 640, 1.0))

    monkeypatch.setattr(lessons, "train", train)
    run = lessons.measured("agents", lessons.Arm("agent"), 0)
    assert (run.reached, run.steps, run.accuracy) == (False, [0, 5, 10], [0.5, 1.0, 1.0])
    assert seen == [("avg@4", inf)]


def test_runs_on_record_are_not_repeated(lessons, tmp_path: Path, monkeypatch, capsys) -> None:
    out, trained = tmp_path / "out.jsonl", []

    def train(_, arm, seed, until=inf, keep=None):
        trained.append((arm.name, seed, keep is not None))
        yield from ((0, 0, 0.25), (1, 8, 0.5), (2, 16, 0.9375))

    monkeypatch.setattr(lessons, "train", train)
    lessons._compare("teacher", range(2), out)
    first = out.read_text().splitlines()
    assert len(first) == 10
    assert json.loads(first[0]) == asdict(
        lessons.Run("teacher", "GRPO", 0, 0.9, True, [0, 1, 2], [0, 8, 16], [0.25, 0.5, 0.9375], 0.0)
    )
    assert [made for made in trained if made[2]] == [("teacher", 1000, True), ("teacher", 1001, True)]
    lessons._compare("teacher", range(2), out)
    assert out.read_text().splitlines() == first
