"""The logs of a run that goes on: each step once, and what was lost or doubled is said."""

import json
from pathlib import Path

import pytest

from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.folder import NOW, resumed_folder
from grpo.runs.records import rewind
from grpo.telemetry.progress import read_now


def write(path: Path, *steps: int) -> None:
    path.write_text("".join(json.dumps({"step": step, "line": n}) + "\n" for n, step in enumerate(steps)))


def read(path: Path) -> list[tuple[int, int]]:
    return [(line["step"], line["line"]) for line in map(json.loads, path.read_text().splitlines())]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_later_steps_and_a_line_that_was_cut_off_are_dropped(log, caplog) -> None:
    write(log, 1, 2, 3, 4)
    with log.open("a") as file:
        file.write('{"step": 3, "li')
    rewind(log, range(1, 4), complete=True)
    assert read(log) == [(1, 0), (2, 1), (3, 2)]
    assert not caplog.records


def test_of_doubled_lines_the_last_is_kept_and_it_is_said(log, caplog) -> None:
    write(log, 1, 2, 3, 2, 3, 4, 9, 9)
    rewind(log, range(1, 5), complete=True)
    assert read(log) == [(1, 0), (2, 3), (3, 4), (4, 5)]
    assert caplog.messages == [f"{log}: more than one line for steps 2 to 3; grpo keeps the last line of each step"]


def test_lost_lines_are_said(log, caplog) -> None:
    write(log, 1, 4, 3, 8)
    rewind(log, range(1, 11), complete=True)
    assert read(log) == [(1, 0), (3, 2), (4, 1), (8, 3)]
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "no line for steps 2, 5 to 7, 9 to 10. Training continues; reports will lack these steps"
    ]


def test_evaluations_are_not_made_at_every_step(log, caplog) -> None:
    write(log, 0, 25)
    rewind(log, range(26), complete=False)
    assert (read(log), caplog.messages) == ([(0, 0), (25, 1)], [])


def test_a_file_that_is_gone(log, caplog) -> None:
    rewind(log, range(1, 1), complete=True)
    assert (log.exists(), caplog.messages) == (False, [])
    rewind(log, range(1, 2), complete=True)
    assert "no line for step 1." in caplog.text


@pytest.mark.parametrize("line", ["notes", "[1]", "{}", '{"step": null}', '{"step": true}', '{"step": 1.0}', '"step"'])
def test_what_is_no_record_is_refused_and_left(log, line: str) -> None:
    log.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a record that grpo wrote"):
        rewind(log, range(1, 3), complete=True)
    assert log.read_text() == f'{{"step": 1}}\n{line}\n'


def test_a_run_that_goes_on_is_not_in_the_phase_in_which_it_was_killed(recipe) -> None:
    cfg = load_recipe(recipe, ["output_dir=killed"])
    folder = Path("killed")
    folder.mkdir()
    (folder / NOW).write_text('["rollout", 3, 9]')
    with resumed_folder(cfg, 0, -1):
        assert read_now(folder) is None
