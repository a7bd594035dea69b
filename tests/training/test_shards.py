"""Several processes that hold one model together give the numbers of one process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import shards_worker
from gaps import gaps_of_facts, gaps_of_files
from test_ranks import HERE, LAUNCH, launch

from grpo.backend.ranks import Ranks
from grpo.model.tensor import TRAINED

pytestmark = pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside this Python")

UPDATED = 2e-5
"""The bound of norms, which are sums in another order, and after an update: AdamW divides small gradients by their
size, so that they are rounded like large ones."""
QUICK = "lora", "quantised-dora"


def held_by(n: int, cases: tuple[str, ...], folder: Path) -> Path:
    out = folder / str(n)
    out.mkdir()
    if n == 1:
        for case in cases:
            shards_worker.made(case, Ranks(), out)
    else:
        ran = launch(n, HERE / "shards_worker.py", out, ",".join(cases), timeout=600)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    return out


def differing(case: str, one: Path, several: Path, n: int) -> Iterator[tuple[str, float]]:
    """What is measured of a case, and how far any process is from one process with the whole model, relatively."""
    told = json.loads((one / f"{case}-0.json").read_text())
    alone = told["facts"]
    for rank in range(n):
        also = json.loads((several / f"{case}-{rank}.json").read_text())
        assert also["notes"]["way"] == told["notes"]["way"]  # what does not agree is not taken, without a word
        assert also["notes"]["bytes"] < 0.75 * told["notes"]["bytes"]
        yield from gaps_of_facts(alone, also["facts"])
        yield from gaps_of_files(case, one, several, rank, ("fresh", "tried", "gradient", "policy", "optimizer"))


def check(cases: tuple[str, ...], n: int, folder: Path) -> None:
    one, several = held_by(1, cases, folder), held_by(n, cases, folder)
    for case in cases:
        for name, gap in differing(case, one, several, n):
            assert gap <= (
                2e-6 if name in ("loss", "logits", "behaviour", "fresh", "tried", "gradient") else UPDATED
            ), (
                case,
                name,
                gap,
            )


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    check(QUICK, 2, tmp_path)


OTHER = *QUICK, *shards_worker.FAMILIES, *shards_worker.REFUSED
KINDS = tuple(case for case in shards_worker.CASES if case not in OTHER)


@pytest.mark.slow
def test_every_kind_of_layer_and_adapter_can_be_divided(tmp_path: Path) -> None:
    check(KINDS, 2, tmp_path)


@pytest.mark.slow
def test_what_comes_out_in_parts_where_all_should_have_the_whole_is_refused(tmp_path: Path) -> None:
    out = held_by(2, tuple(shards_worker.REFUSED), tmp_path)
    for rank in range(2):
        assert re.search(
            "adapter.targets: mlp.gate is whole .* only a part of its adapter's gradient: remove it",
            said(out, "router", rank),
        )
        assert re.search("deepseek_v3 .* gradients .before layer 0. differ between", said(out, "latent", rank))


def said(out: Path, case: str, rank: int) -> str:
    return (out / f"{case}-{rank}.txt").read_text()


@pytest.mark.slow
def test_four_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    check(QUICK, 4, tmp_path)


@pytest.mark.slow
def test_every_architecture_that_may_be_divided_is_right(tmp_path: Path) -> None:
    kinds = {shards_worker.small_model(name).args.model_type for name in shards_worker.FAMILIES}
    assert kinds - {"mistral"} == set(TRAINED)
    check(shards_worker.FAMILIES, 2, tmp_path)
