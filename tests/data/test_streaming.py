"""Rows that are read as they come: windows that are shuffled by themselves, and a place that resumes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import disable_progress_bars

from grpo.config import DataConfig
from grpo.data.fingerprint import fingerprint
from grpo.data.loading import open_stream
from grpo.data.prompts import PromptReader
from grpo.data.streaming import Streamed, WindowStream, first_streamed
from grpo.errors import UserError
from grpo.types import Task

ROWS = 25
disable_progress_bars()


def config(source: object, **settings: object) -> DataConfig:
    return DataConfig(source=source, streaming=True, prompt="{question}?", **settings)


def stream(cfg: DataConfig, seed: int = 0) -> WindowStream:
    return WindowStream(open_stream(cfg), PromptReader(cfg), seed)


@pytest.fixture(params=["jsonl", "csv", "parquet", "two"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    rows = [{"question": f"q{n}", "answer": str(n)} for n in range(ROWS)]
    if request.param == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=4)
    elif request.param == "csv":
        lines = [f"{row['question']},a{row['answer']}" for row in rows]
        (tmp_path / "rows.csv").write_text("\n".join(["question,answer", *lines]) + "\n")
    else:
        cut = 9 if request.param == "two" else ROWS
        for name, some in (("rows", rows[:cut]), ("more", rows[cut:])):
            if some:
                (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        if request.param == "two":
            return (str(tmp_path / "rows.jsonl"), str(tmp_path / "more.jsonl"))
    return str(tmp_path / f"rows.{'jsonl' if request.param == 'two' else request.param}")


def indices(tasks: list[Task]) -> list[int]:
    assert [str(task.prompt) for task in tasks] == [f"q{task.index}?" for task in tasks]
    return [task.index for task in tasks]


def test_each_epoch_visits_every_row_once_window_by_window(source: object) -> None:
    rows = stream(config(source, window=10))
    for epoch in range(3):
        seen = indices(rows.take(ROWS))
        windows = [seen[:10], seen[10:20], seen[20:]]
        assert [sorted(window) for window in windows] == [[*range(10)], [*range(10, 20)], [*range(20, 25)]]
        assert all(window != sorted(window) for window in windows)
        assert [n % 10 for n in windows[0]] != [n % 10 for n in windows[1]], "each window has an order of its own"
        assert rows.metrics()["epoch"] == epoch
    again, other = stream(config(source, window=10)), stream(config(source, window=10), seed=1)
    first, second = indices(again.take(ROWS)), indices(again.take(ROWS))
    assert first != second, "each epoch has an order of its own"
    assert indices(other.take(ROWS)) != first


def test_rows_keep_their_order_without_shuffle(source: object) -> None:
    assert indices(stream(config(source, shuffle=False)).take(2 * ROWS)) == [*range(ROWS)] * 2


@pytest.mark.each_value
@pytest.mark.parametrize("taken", [1, 10, 17, 25, 60])
def test_a_stream_goes_on_from_a_state_to_the_row(source: object, taken: int) -> None:
    cfg = config(source, window=10)
    whole = stream(cfg)
    tasks = whole.take(taken + 40)
    before, after = stream(cfg), stream(cfg)
    assert before.take(taken) == tasks[:taken]
    state = json.dumps(before.state())
    assert len(state) < 2000
    before.take(13)
    after.load_state(json.loads(state))
    assert after.take(40) == tasks[taken:]
    assert (after.state(), after.metrics()) == (whole.state(), whole.metrics())
    after.load_state({"cursor": 7, "dropped": 0})  # of a run that had all rows
    assert after.take(3) == tasks[:3]


@pytest.mark.parametrize(
    ("window", "rows", "said"), [(4, ROWS, "data.window"), (20, ROWS, "data.window"), (10, 13, "file"), (10, 3, "file")]
)
def test_with_another_window_or_file_the_epoch_begins_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, window: int, rows: int, said: str
) -> None:
    """As with --resume-changed: a place in other windows, or beyond the end of a file, is none."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": f"q{n}"}) + "\n" for n in range(ROWS)]
    path.write_text("".join(lines))
    before = stream(config(str(path), window=10))
    before.take(ROWS + 18)
    state = json.loads(json.dumps(before.state()))
    path.write_text("".join(lines[:rows]))
    after = stream(config(str(path), window=window))
    after.load_state(state)
    assert f"epoch 1 begins again, because the checkpoint was written with another {said}" in caplog.text
    assert sorted(indices(after.take(rows))) == [*range(rows)]
    assert after.state()["epoch"] == 1


def test_no_more_than_a_window_is_read_ahead(tmp_path: Path) -> None:
    """A line that is no row is found when its window comes."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": "q" * 10_000}) + "\n" for _ in range(2500)) + "not JSON\n")
    rows = stream(config(str(path), window=100))
    assert len(rows.take(500)) == 500
    with pytest.raises(UserError, match=r"rows\.jsonl: cannot be read from row [\d,]+ on: "):
        rows.take(5000)


def test_what_cannot_be_asked_is_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": None if n % 3 else f"q{n}"}) + "\n" for n in range(9)))
    rows = stream(config(str(path), window=4))
    assert {task.index for task in rows.take(6)} == {0, 3, 6}
    assert rows.metrics()["dropped_prompts"] >= 9
    path.write_text('{"question": null}\n' * 9)
    with pytest.raises(UserError, match=r"8 consecutive rows have a prompt that is null or longer"):
        stream(config(str(path), window=4)).take(1)


def test_the_first_tasks_are_in_the_rows_own_order(source: object) -> None:
    cfg = config(source)
    rows = open_stream(cfg)
    assert indices(first_streamed(rows, PromptReader(cfg), 7)) == [*range(7)]
    assert len(first_streamed(rows, PromptReader(cfg), 100)) == ROWS
    assert len(first_streamed(rows, PromptReader(cfg), 100, most=5)) == 5


def test_columns_go_by_other_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "2+2", "a": {"gold": "4"}}\n')
    cfg = config(str(path), columns={"question": "q", "answer": "a.gold"})
    assert stream(cfg).take(1)[0].columns["answer"] == "4"
    with pytest.raises(UserError, match=r"data\.columns\.answer: no column 'a\.silver' in row 0 of .*rows\.jsonl"):
        open_stream(config(str(path), columns={"answer": "a.silver"}))


def test_a_file_that_changes_is_noticed_and_one_that_moves_is_not(tmp_path: Path) -> None:
    path, moved = tmp_path / "rows.jsonl", tmp_path / "elsewhere.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{n:06}"}) + "\n" for n in range(20_000)))
    was = fingerprint(open_stream(config(str(path))))
    moved.write_bytes(path.read_bytes())
    os.utime(moved, (1, 1))
    assert fingerprint(open_stream(config(str(moved)))) == was
    for change in (lambda b: b + b'{"question": "more"}\n', lambda b: b.replace(b"q000000", b"q00000x")):
        moved.write_bytes(change(path.read_bytes()))
        assert fingerprint(open_stream(config(str(moved)))) != was
    assert fingerprint(open_stream(config(str(path), columns={"other": "question"}))) != was


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": "builtin:countdown"}, "data.streaming is for files and Hub datasets"),
        ({"use": "rows.py", "source": None}, "data.streaming is for files and Hub datasets"),
        ({"curriculum": {}}, "data.curriculum needs all rows"),
        ({"sampler": "mine.py:Mine"}, "data.sampler needs all rows"),
        ({"shuffle": False, "window": 5}, "data.window does nothing with data.shuffle: false"),
        ({"streaming": False, "window": 5}, "data.window does nothing without data.streaming"),
    ],
)
def test_settings_that_need_all_rows_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataConfig(**{"source": "rows.jsonl", "streaming": True, **settings})


@pytest.mark.parametrize(
    ("name", "said"), [("away.jsonl", "there is no such file"), ("empty.jsonl", "the file is empty")]
)
def test_files_that_are_not_there_are_said(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=said):
        open_stream(config(str(tmp_path / name)))


@pytest.mark.slow
def test_a_million_rows_begin_at_once_and_hold_a_window(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for start in range(0, 1_000_000, 10_000):
            file.write("".join(f'{{"question": "q{n}"}}\n' for n in range(start, start + 10_000)))
    began = time.monotonic()
    rows = stream(config(str(path)))
    rows.take(64)
    assert time.monotonic() - began < 10
    assert isinstance(rows._rows, Streamed)
    assert len(rows._window or ()) == 10_000
