"""Agents that are programs: what they are given, what their last line says, how they end and are ended."""

import datetime
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hosting import until

from grpo.config.environment import EnvironmentConfig
from grpo.environments.making import make_host
from grpo.environments.program import LastLine
from grpo.environments.seats import Reply
from grpo.processes.tree import descendants

ENDPOINT = {"base_url": "http://127.0.0.1:1/v1", "api_key": "key", "seed": 5}
SHELL = {  # a program that row `name` chooses
    "number": "echo first; echo; echo ' 0.5 '; echo",
    "object": 'printf \'{"reward": 1, "steps": 3}\'',
    "null": "echo null",
    "nothing": "true",
    "words": "echo well done",
    "text": "echo '\"good\"'",
    "code": "echo 1; echo not so >&2; exit 3",
    "killed": "kill -9 $$",
    "reads nothing": "exec 0<&-; echo 2",
    "long": "head -c 300000 /dev/zero | tr '\\0' x; echo; echo 4",
}
CHOOSES = 'import json,os,sys; os.execv("/bin/sh", ["sh", "-c", json.loads(sys.argv[1])[json.loads(input())["name"]]])'
SEES = """
import json, os, sys
row = json.loads(sys.stdin.read())
names = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "GRPO_SEED", "A_SECRET_TOKEN")
print(json.dumps({name: os.environ.get(name) for name in names} | {"row": row}), file=sys.stderr)
print(len(row))
"""


@pytest.fixture(scope="module")
def shell() -> Iterator:
    host = make_host(EnvironmentConfig(command=(sys.executable, "-c", CHOOSES, json.dumps(SHELL))))
    yield host
    host.close()


def ran(host, **row) -> Reply:
    (seat,) = host.seats(0, 1)
    assert seat.reset(row, 5).result() == Reply()
    reply = seat.call("run", ENDPOINT).result()
    seat.release()
    return reply


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number", {"reward": 0.5, "metrics": {}}),
        ("object", {"reward": 1.0, "metrics": {"steps": 3.0}}),
        ("null", {"reward": None, "metrics": {}}),
        ("reads nothing", {"reward": 2.0, "metrics": {}}),
        ("long", {"reward": 4.0, "metrics": {}}),
    ],
)
def test_the_last_line_is_the_reward(shell, name: str, value) -> None:
    row = {"filler": "x" * 300_000} if name == "reads nothing" else {}  # more than a pipe holds
    reply = ran(shell, name=name, **row)
    assert (reply.kind, json.loads(reply.value or "null")) == ("ok", value), reply.error


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "its program wrote nothing to standard output: the last line must be the reward, as JSON"),
        ("words", "its last line is not JSON: 'well done'."),
        ("text", "the returned reward is not a usable number: 'good'"),
        ("code", "its program ended with exit code 3; it printed: not so"),
        ("killed", "its program ended with SIGKILL"),
    ],
)
def test_every_other_end_is_an_error(shell, name: str, said: str) -> None:
    reply = ran(shell, name=name)
    assert (reply.kind, reply.error[: len(said)]) == ("error", said)
    assert ran(shell, name="number").kind == "ok", "the others go on"


def test_a_program_gets_the_row_and_where_to_ask(capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET_TOKEN", "hidden")
    host = make_host(EnvironmentConfig(command=(sys.executable, "-c", SEES), name="seer"))
    day = datetime.date(2026, 1, 2)
    reply = ran(host, prompt="é", day=day, array=np.arange(2), count=np.int64(3))
    assert json.loads(reply.value)["reward"] == 4.0
    assert (host.description.name, host.description.kind) == ("seer", "agent")
    host.close()
    printed = capfd.readouterr().err
    seen = json.loads(next(line for line in printed.splitlines() if "OPENAI" in line).removeprefix("[seer] "))
    assert seen == {
        "OPENAI_BASE_URL": ENDPOINT["base_url"],
        "OPENAI_API_KEY": "key",
        "GRPO_SEED": "5",
        "A_SECRET_TOKEN": None,
        "row": {"prompt": "é", "day": "2026-01-02", "array": [0, 1], "count": 3},
    }


def test_what_else_it_prints_is_shown(shell, capfd) -> None:
    assert ran(shell, name="number").kind == "ok"
    assert ran(shell, name="words").kind == "error"
    host = make_host(EnvironmentConfig(command=("/bin/sh", "-c", "echo hello; echo oh >&2; echo 1")))
    ran(host)
    host.close()
    printed = capfd.readouterr().err
    assert "[sh] hello\n" in printed
    assert "[sh] oh\n" in printed
    assert "[sh] 1\n" not in printed


def test_a_row_that_json_does_not_hold_is_an_error(shell) -> None:
    assert "not JSON compliant" in ran(shell, name="number", share=float("nan")).error
    reply = ran(shell, name="number", odd=object())
    assert reply == Reply("error", error="the row cannot be passed to a program as JSON: it has a value of type object")


def test_a_program_that_is_not_there_is_found_before_the_run(shell) -> None:
    assert shell.problem(["name"]) is None
    host = make_host(EnvironmentConfig(command=("no-such-program", "agent.js")))
    assert host.problem([]) == "command: there is no program 'no-such-program'"
    line = make_host(EnvironmentConfig(command=("no-such-program agent.js", "1")))
    assert line.problem([]).endswith('. Write each word as a separate item: ["no-such-program", "agent.js", "1"]')
    line.close()
    assert ran(host) == Reply(
        "error", error="its program ended with exit code 127; it printed: no-such-program: No such file or directory"
    )
    host.close()


FORKS = "setsid sleep 60 & sleep 60 & echo begun >&2; "
forks = pytest.mark.skipif(shutil.which("setsid") is None, reason="there is no setsid here")


@forks
@pytest.mark.parametrize("end", ["sleep 60", "echo 1"], ids=["given up", "over"])
def test_what_a_program_starts_ends_with_it(end: str) -> None:
    command = ("/bin/sh", "-c", FORKS + end)
    host = make_host(EnvironmentConfig(command=command, rollout_timeout=0.7 if end == "sleep 60" else 30.0))
    reply = ran(host, filler="x" * 300_000)  # which it does not read
    assert reply.kind == ("timeout" if end == "sleep 60" else "ok")
    assert reply.error in ("", "the agent gave no answer in 0.7 s (environment.rollout_timeout)")
    (home,) = host._homes
    until(lambda: len(descendants(home._process.pid)) == 1, 5.0)  # its worker alone
    assert not home.retired
    host.close()


@forks
def test_the_end_of_the_run_ends_a_program() -> None:
    host = make_host(EnvironmentConfig(command=("/bin/sh", "-c", FORKS + "sleep 60")))
    (seat,) = host.seats(0, 1)
    seat.reset({}, 0).result()
    future = seat.call("run", ENDPOINT)
    until(lambda: len(descendants(seat.home._process.pid)) == 6)  # worker, keeper, shell, three that sleep
    started = descendants(seat.home._process.pid)
    host.close()
    assert future.result().kind == "crash"
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_nothing_is_left_open_by_many_programs() -> None:
    host = make_host(EnvironmentConfig(command=("/bin/sh", "-c", "echo 1")))
    ran(host)
    (worker,) = descendants(host._homes[0]._process.pid)
    folder = Path(f"/proc/{worker}/fd")
    if not folder.is_dir():
        pytest.skip("descriptors are counted in /proc")
    before = len(list(folder.iterdir()))
    for _ in range(5):
        ran(host, filler="x" * 300_000)  # which it does not read
    assert len(list(folder.iterdir())) == before
    host.close()


def test_the_last_line_in_pieces() -> None:
    passed = []
    lines = LastLine(passed.append)
    for part in (b"a\nb", b"c\n\n", b" \nd", b"e"):
        lines.feed(part)
    assert lines.end() == b"de"
    assert passed == [b"a\n", b"bc\n"]
