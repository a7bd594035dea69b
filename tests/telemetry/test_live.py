"""`grpo watch`: the page and its data over the loopback, as the runs go on, and nothing else."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs.driver import run
from telemetry.pages import data_in

from grpo.errors import UserError
from grpo.progress import RowCounts
from grpo.telemetry.jsonl import JsonlLogger
from grpo.telemetry.live import HOST, LiveRuns, server_of
from grpo.telemetry.progress import NowFile
from grpo.types import StepMetrics

FOLDER = Path("runs/toy")


@contextmanager
def served(runs: LiveRuns) -> Iterator[int]:
    """The port at which runs are served."""
    with server_of(runs) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def asked(port: int, path: str, host: str | None = None, method: str = "GET") -> tuple[int, str, str]:
    """Status, type and text of an answer."""
    client = http.client.HTTPConnection(HOST, port, timeout=30)
    client.putrequest(method, path, skip_host=True)
    client.putheader("Host", host or f"{HOST}:{port}")
    client.endheaders()
    answer = client.getresponse()
    made = answer.status, answer.getheader("Content-Type", ""), answer.read().decode()
    client.close()
    return made


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_page_and_its_data_follow_a_run(recipe) -> None:
    run(recipe)
    clock = Clock()
    with served(LiveRuns([FOLDER], clock)) as port:
        status, kind, text = asked(port, "/")
        assert (status, kind) == (200, "text/html; charset=utf-8")
        assert 'data-live="data.json"' in text
        assert data_in(text)["runs"][0]["step"] == 2
        status, kind, text = asked(port, "/data.json")
        assert (status, kind) == (200, "application/json; charset=utf-8")
        assert len(json.loads(text)["runs"][0]["completions"]["rows"]) == 16
        JsonlLogger(FOLDER).log(StepMetrics(3, {"reward": 0.25}))
        for seconds, has_completions in ((2.0, True), (4.0, False), (18.0, True), (2.0, True)):
            clock.now += seconds
            (seen,) = json.loads(asked(port, "/data.json?1")[2])["runs"]
            assert (seen["step"], seen["metrics"]["reward"][-1]) == (3, 0.25)
            assert ("completions" in seen) is has_completions


def test_it_only_reads_and_only_for_this_machine(recipe) -> None:
    run(recipe, "optim.steps=1")
    before = {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*")}
    with served(LiveRuns([FOLDER])) as port:
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", ""):
            status, _, text = asked(port, "/data.json", host or "x")
            assert (status, "reward" in text) == (403, False)
        assert asked(port, "/data.json", f"localhost:{port}")[0] == 200
        for path in ("/recipe.yaml", "/../recipe.yaml", "/data.json/"):
            assert asked(port, path)[0] == 404
        for method in ("POST", "PUT", "DELETE"):
            assert asked(port, "/", method=method)[0] == 501
        status, _, text = asked(port, "/", method="HEAD")
        assert (status, text) == (200, "")
    assert {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*")} == before


def test_the_phase_that_a_running_run_is_in(recipe, monkeypatch) -> None:
    run(recipe, "optim.steps=1")
    now = NowFile(FOLDER)
    now.progress("rollout", 23_456, 60_000, RowCounts(21, 64, 141))
    runs = LiveRuns([FOLDER])
    assert "now" not in json.loads(runs.data())["runs"][0]  # it was killed, say
    monkeypatch.setattr("grpo.telemetry.recorded.is_running", lambda _: True)
    (seen,) = json.loads(runs.data())["runs"]
    assert seen["now"] == "rollout: 23,456 tokens, 21 of 64 rows, 2.2 turns a row"
    now.close()
    assert "now" not in json.loads(runs.data())["runs"][0]


def test_records_that_cannot_be_read_are_told_and_come_back(recipe) -> None:
    run(recipe, "optim.steps=1")
    records = FOLDER / "metrics.jsonl"
    good = records.read_text()
    with served(LiveRuns([FOLDER])) as port:
        records.write_text(good + "{}\n")
        status, _, text = asked(port, "/data.json")
        assert (status, "metrics.jsonl:2: not a record that grpo wrote" in text) == (503, True)
        records.write_text(good)
        assert asked(port, "/data.json")[0] == 200


def test_files_that_are_gone_are_told_and_a_wrong_name_is_told_the_right_one(recipe, monkeypatch) -> None:
    run(recipe, "optim.steps=1")
    runs = LiveRuns([FOLDER])

    def gone() -> str:
        raise FileNotFoundError("step-000001.parquet")

    monkeypatch.setattr(runs, "data", gone)
    with served(runs) as port:
        status, _, text = asked(port, "/data.json")
        assert (status, text) == (503, "step-000001.parquet\n")
        said = f"open http://localhost:{port}/; from another machine, use ssh -L {port}:127.0.0.1:{port} HOST\n"
        assert asked(port, "/", "localhost:9")[2] == said


def test_what_cannot_be_watched_is_refused(recipe, run_cli) -> None:
    assert "there is no such folder" in run_cli("watch", "runs/none").err
    run(recipe, "optim.steps=1")
    with server_of(LiveRuns([FOLDER])) as taken, pytest.raises(UserError, match="--port 0 for any free port"):
        server_of(LiveRuns([FOLDER]), taken.server_address[1])


@pytest.mark.slow
def test_the_command_says_where_and_ends_by_ctrl_c(recipe) -> None:
    run(recipe, "optim.steps=1")
    command = [sys.executable, "-c", "from grpo.cli import main; main()", "watch", str(FOLDER), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        where = process.stdout.readline()
        port = int(where.partition(f"http://{HOST}:")[2].partition("/")[0])
        assert asked(port, "/data.json")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
