"""Files of solve rates: written, read, held against the rows, and what they choose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from grpo.config import DataConfig
from grpo.data.loading import load_rows, prepared_rows
from grpo.data.rates import SolveRates, known_rates
from grpo.errors import UserError

ROWS = [{"question": f"{n}?", "gold": n} for n in range(6)]
RATES = {0: 0.0, 1: 0.1, 2: 0.5, 4: 0.9, 5: 1.0}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rates.jsonl"
    SolveRates.of(RATES, ROWS, {"data": "mine", "split": "train"}).write(path)
    return path


def config(**settings) -> DataConfig:
    return DataConfig(source="rows", solve_rates="rates.jsonl", **settings)


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
@pytest.mark.parametrize("columns", [{}, {"answer": "gold"}])
def test_tasks_between_are_kept_the_bounds_included(file, kind, columns) -> None:
    cfg = config(solve_rate=(0.1, 0.9), columns=columns)
    rows = prepared_rows(kind(ROWS), cfg)
    assert [rows[place]["gold"] for place in range(len(rows))] == [1, 2, 4]
    if columns:
        assert rows[2]["answer"] == 4
    assert known_rates(cfg, rows).tolist() == [0.1, 0.5, 0.9]


def test_for_a_curriculum_alone_all_rows_stay(file) -> None:
    cfg = config(curriculum={})
    rows = prepared_rows(ROWS, cfg)
    known = known_rates(cfg, rows)
    assert len(rows) == len(known) == 6
    assert {index: rate for index, rate in enumerate(known.tolist()) if rate == rate} == RATES
    assert known_rates(DataConfig(source="rows"), rows) is None


@pytest.mark.parametrize("rows", [ROWS[:5], [*ROWS[:5], {"question": "other?", "gold": 5}], ROWS[::-1]])
def test_rates_of_other_rows_are_refused(file, rows) -> None:
    with pytest.raises(
        UserError, match=r"rates were measured on other rows \(mine, split train: 6 rows\).*--split train"
    ):
        known_rates(config(curriculum={}), rows)
    with pytest.raises(UserError, match=r"rates were measured on other rows"):
        prepared_rows(rows, config(solve_rate=(0, 1)))


def test_nothing_between_is_said(file) -> None:
    with pytest.raises(UserError, match=r"none of the 5 tasks in rates.jsonl has a solve rate from 0.2 to 0.4"):
        prepared_rows(ROWS, config(solve_rate=(0.2, 0.4)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "its first line"),
        ("[]\n", "its first line"),
        ('{"rows": 6}\n', "its first line"),
        ('{"rows": 6, "fingerprint": "a"}\n{"index": 0}\n', "line 2"),
        ('{"rows": 6, "fingerprint": "a"}\n{"index": 6, "solve_rate": 0}\n', "line 2"),
        ('{"rows": 6, "fingerprint": "a"}\n{"index": 0, "solve_rate": 1.5}\n', "line 2"),
        ('{"rows": 6, "fingerprint": "a"}\n{"index": 0, "solve_rate": NaN}\n', "line 2"),
        ("no JSON\n", "its first line"),
    ],
)
def test_what_is_no_such_file_is_said(file, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(UserError, match=f"rates.jsonl: {said} is not in the format of grpo eval --solve-rates"):
        known_rates(config(curriculum={}), ROWS)
    file.unlink()
    with pytest.raises(UserError, match=r"rates.jsonl: No such file"):
        prepared_rows(ROWS, config(solve_rate=(0, 1)))


def test_the_line_to_blame_is_named_among_many_and_the_last_rate_of_a_row_counts(file) -> None:
    file.write_text(file.read_text() + '{"index": 1, "solve_rate": 1}\n\n')
    assert known_rates(config(curriculum={}), ROWS)[1] == 1
    file.write_text(file.read_text().replace('"index": 5', '"index": 5.5'))
    with pytest.raises(UserError, match="line 6 is not"):
        known_rates(config(curriculum={}), ROWS)


def test_a_file_in_which_no_task_has_a_rate_keeps_none_and_begins_with_none(file) -> None:
    SolveRates.of({}, ROWS, {}).write(file)
    assert np.isnan(known_rates(config(curriculum={}), ROWS)).all()
    with pytest.raises(UserError, match="none of the 0 tasks"):
        prepared_rows(ROWS, config(solve_rate=(0, 1)))


def test_eval_measures_training_rows_and_training_keeps_those_between(recipe, run_cli) -> None:
    """The command's file, for the recipe that wrote it: two of four rows are kept by a reward of this test's own."""
    Path("known.py").write_text(
        "def reward(prompts, completions, answer, **kwargs):\n    return [int(a) / 4 - 0.5 for a in answer]\n"
    )
    asked = ("rewards=[{use: known.py:reward}]", "data.columns={question2: question}")
    held = ("eval={split: train, samples: 2}",)
    ran = run_cli("eval", recipe, *asked, *held, "--prompts", 4, "--solve-rates", "rates.jsonl")
    assert (ran.code, "solve rates: rates.jsonl" in ran.out) == (0, True), ran.err
    head, *lines = map(json.loads, Path("rates.jsonl").read_text().splitlines())
    assert [line["solve_rate"] for line in lines] == [0, 0.5, 1, 1]  # -0 … 1.5
    assert (head["rows"], head["reward"], head["samples"], head["split"]) == (4, "known", 2, "train")
    chosen = ("data.solve_rates=rates.jsonl", "data.solve_rate=[0.5, 1]")
    ran = run_cli("train", recipe, *asked, *chosen, "--dry-run")
    assert ran.code == 0, ran.err
    assert "3 tasks have a solve rate from 0.5 to 1 and are trained on; 4 of 4 tasks have a rate in " in ran.out
    assert "by known)" in ran.out
    again = run_cli("eval", recipe, *asked, *chosen, *held, "--solve-rates", "again.jsonl")  # of all rows again
    assert again.code == 0, again.err
    assert Path("again.jsonl").read_text() == Path("rates.jsonl").read_text()


@pytest.mark.parametrize("where", ["nowhere/rates.jsonl", "."])
def test_a_file_that_could_not_be_written_is_said_at_once(recipe, run_cli, where) -> None:
    ran = run_cli("eval", recipe, "--solve-rates", where)
    assert ran.code != 0
    assert f"--solve-rates {where}" in ran.err


def test_rows_of_a_saved_file_are_those_of_the_list(file) -> None:
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    cfg = DataConfig(source="train.jsonl", solve_rates="rates.jsonl", solve_rate=(0.5, 0.5))
    assert load_rows(cfg)[0]["gold"] == 2
