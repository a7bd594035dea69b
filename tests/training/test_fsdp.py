"""Several processes that spread the weights among them give the numbers of one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fsdp_worker
import pytest
from gaps import gaps_of_facts, gaps_of_files
from test_ranks import HERE, LAUNCH, launch

from grpo.backend.ranks import Ranks

pytestmark = pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside this Python")

SUMMED, UPDATED = 1e-6, 2e-5
"""Bounds, relative: of a gradient, which is a sum in another order; and after an update, because AdamW divides small
gradients by their size, so that they are rounded like large ones."""
QUICK = ("full",)


def made_by(n: int, cases: tuple[str, ...], folder: Path, how: str = "spread") -> Path:
    out = folder / f"{n}-{how}"
    out.mkdir()
    if n == 1:
        for case in cases:
            fsdp_worker.made(case, Ranks(), out)
    else:
        ran = launch(n, HERE / "fsdp_worker.py", out, ",".join(cases), how, timeout=600)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    return out


def differing(case: str, one: Path, several: Path, n: int, among: int) -> Iterator[tuple[str, float]]:
    """What is measured of a case, and how far any process is from one process alone, relatively."""
    alone = json.loads((one / f"{case}-0.json").read_text())["facts"]
    for rank in range(n):
        got = json.loads((several / f"{case}-{rank}.json").read_text())
        assert got["notes"]["held"] < (1.15 / among + 0.1) * got["notes"]["bytes"], got["notes"]
        yield from gaps_of_facts(alone, got["facts"])
        yield from gaps_of_files(case, one, several, rank, ("gradient", "policy", "optimizer"))


def check(
    cases: tuple[str, ...], n: int, folder: Path, updated: float = UPDATED, plain: int = 1, how: str = "spread"
) -> None:
    """`plain` processes, each with the whole, are what it is compared with."""
    one, several = made_by(plain, cases, folder, "plain"), made_by(n, cases, folder, how)
    for case in cases:
        for name, gap in differing(case, one, several, n, 2 if how == "groups" else n):
            assert gap <= (SUMMED if name in ("loss", "gradient", "norm") else updated), (case, name, gap)


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    check(QUICK, 2, tmp_path)


OTHERS = tuple(case for case in fsdp_worker.CASES if case not in (*QUICK, "packed", "dropout"))


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_every_kind_of_model_and_training_can_be_spread(case: str, tmp_path: Path) -> None:
    check((case,), 2, tmp_path)


@pytest.mark.slow
def test_moments_in_8_bits_are_those_of_whole_arrays_but_for_the_dither(tmp_path: Path) -> None:
    check(("packed",), 2, tmp_path, updated=5e-3)


@pytest.mark.slow
def test_each_process_drops_what_it_drops_when_it_has_the_whole(tmp_path: Path) -> None:
    check(("dropout",), 2, tmp_path, plain=2)


@pytest.mark.slow
def test_four_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    check(("lora", "full", "odd", "few"), 4, tmp_path)


@pytest.mark.slow
def test_two_groups_that_spread_weights_give_the_numbers_of_one_process(tmp_path: Path) -> None:
    check(("lora", "full"), 4, tmp_path, how="groups")
