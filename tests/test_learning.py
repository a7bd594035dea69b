"""The script that measures learning: its table, by hand, and that a finished run is not repeated."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from benchmark_scripts import script


@pytest.fixture(scope="module")
def learning():
    with script("learning") as module:
        yield module


def result(learning, loss: str, seed: int, before: float, after: float):
    return learning.Result("sorting", loss, seed, [0, 40], [0.1, 1.0], [before, after], 10.0)


def test_the_table_by_hand(learning) -> None:
    dapo = [result(learning, "dapo", seed, before, after) for seed, before, after in ((0, 0.3, 0.9), (1, 0.4, 0.8))]
    lines = learning.table([*dapo, result(learning, "gspo", 0, 0.25, 0.75)]).splitlines()
    assert lines[2:] == [
        "| sorting | dapo | 35.0 ± 63.5 | 85.0 ± 63.5 | 50.0 ± 127.1 | 10.0 ± 0.0 | 100.0 ± 0.0 |",
        "| sorting | gspo | 25.0 | 75.0 | 50.0 | 10.0 | 100.0 |",
    ]


def test_a_finished_run_is_not_repeated(learning, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(learning, "_train", lambda *_: pytest.fail("it was repeated"))
    kept = result(learning, "dapo", 0, 0.3, 0.9)
    folder = tmp_path / "sorting-dapo-0-40"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(asdict(kept)))
    assert learning._result(("sorting", "dapo", 0), 40, tmp_path) == kept
    assert "sorting-dapo-0-40: 30.0% to 90.0% in 10 s" in capsys.readouterr().out


def test_the_curves_are_small_and_name_the_losses(learning, tmp_path: Path) -> None:
    learning.plot([result(learning, loss, 0, 0.3, 0.9) for loss in learning.LOSSES], tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert len(drawn) < 100_000
    assert all(f">{loss}<" in drawn for loss in learning.LOSSES)
