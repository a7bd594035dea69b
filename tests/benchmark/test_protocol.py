"""What a measurement reports: turns, means, and ratios that say better whichever way a unit counts."""

import json
from itertools import count

import pytest

from grpo.benchmark.protocol import Side, alternate, write_json


def side(name: str, speeds: list[float], gigabytes: list[float], order: list[str]) -> Side:
    turn = count()

    def run() -> dict[str, float]:
        order.append(name)
        number = next(turn)
        return {"tok/s": speeds[number], "GB": gigabytes[number]}

    return Side(name, run)


def test_sides_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []
    rows = alternate(
        "case", [side("peer", [1, 10, 20], [9, 4, 4], order), side("grpo", [2, 40, 50], [9, 1, 1], order)], runs=2
    )
    assert order == ["peer", "grpo"] * 3
    by = {(row.side, row.unit): row for row in rows}
    assert by["peer", "tok/s"].mean == 15
    assert by["peer", "tok/s"].sd == pytest.approx(50**0.5)
    assert by["peer", "tok/s"].cold == 1
    assert by["peer", "tok/s"].ratio is None
    assert by["grpo", "tok/s"].ratio == 3
    assert by["grpo", "GB"].ratio == 4  # less memory is better


def test_a_single_run_has_no_spread() -> None:
    once, twice = (alternate("case", [side("peer", [1, 10, 20], [9, 4, 4], [])], runs)[0].line() for runs in (1, 2))
    assert "±" not in once
    assert "± 47.1 %" in twice  # √50 / 15


def test_the_file_names_machine_versions_and_rows(tmp_path) -> None:
    rows = alternate("case", [side("peer", [1, 2], [1, 1], []), side("grpo", [1, 4], [1, 1], [])], runs=1)
    write_json(tmp_path / "out.json", rows)
    document = json.loads((tmp_path / "out.json").read_text())
    assert set(document) == {"machine", "versions", "rows"}
    assert {"python", "mlx", "mlx-lm", "grpo"} <= set(document["versions"])
    assert document["rows"][2] == {
        "case": "case", "side": "grpo", "unit": "tok/s",
        "mean": 4.0, "sd": 0.0, "runs": [4.0], "cold": 1.0, "ratio": 2.0,
    }  # fmt: skip
