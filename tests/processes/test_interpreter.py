"""A persistent interpreter in the sandbox: what stays, what is told, and that nothing outlives it."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from grpo.processes import tree
from grpo.processes.sandbox import cell
from grpo.processes.sandbox.cell import Limits
from grpo.processes.sandbox.session import Interpreter, Ran

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is a sandbox on Linux only")


@pytest.fixture
def interpreter() -> Iterator[Interpreter]:
    made = Interpreter(Limits(seconds=20.0))
    yield made
    made.end()


@pytest.fixture
def small() -> Iterator[Interpreter]:
    made = Interpreter(Limits(seconds=20.0, memory_mb=256, processes=16, disk_mb=4))
    yield made
    made.end()


def pids() -> set[int]:
    """The processes below this one that have not ended."""
    return {pid for pid in tree.descendants(os.getpid()) if state(pid) not in "ZX"}


def state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


def gone(before: set[int], but: int = 0) -> bool:
    """Whether soon there are no more processes than before, `but` so many."""
    deadline = time.monotonic() + 20
    while len(pids() - before) > but and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(pids() - before) == but


def test_what_is_defined_stays_and_the_last_value_is_told(interpreter: Interpreter) -> None:
    assert interpreter.run("import math\nx = 3\nprint('hi')\nx * 2") == Ran("hi\n", "6")
    assert interpreter.run("def f(y):\n    return math.factorial(x) + y") == Ran("")
    assert interpreter.run("f(1)") == Ran("", "7")
    assert interpreter.run("None") == Ran("")
    assert interpreter.run("import subprocess\nfor text in 'ab': subprocess.run(['echo', text])").printed == "a\nb\n"


def test_an_exception_is_told_and_ends_nothing(interpreter: Interpreter) -> None:
    interpreter.run("x = 1")
    error = interpreter.run("print('before')\ndef f():\n    raise ValueError('no')\nf()").error
    assert error == (
        'Traceback (most recent call last):\n  File "<call 2>", line 4, in <module>\n    f()\n'
        "  File \"<call 2>\", line 3, in f\n    raise ValueError('no')\nValueError: no"
    )
    for code, said in [
        ("x =", "SyntaxError: invalid syntax"),
        ("'\\ud800'.encode()", "UnicodeEncodeError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def g(): g()\ng()", "RecursionError"),
        ("bytearray(10 << 30)", "MemoryError"),
        ("x = '\0'", "SyntaxError: source code string cannot contain null bytes"),
        ("class E(Exception):\n    def __str__(self): raise SystemExit\nraise E", "E: <exception str() failed>"),
        ("open('/etc/passwd')", "FileNotFoundError"),
        ("import socket; socket.socket()", "PermissionError"),
        ("open('big', 'wb').write(b'x' * (80 << 20))", "OSError"),
    ]:
        ran = interpreter.run(code)
        assert ran.lost is None, code
        assert said in str(ran.error) or "cannot be printed" in str(ran.error), code
    assert interpreter.run("x") == Ran("", "1")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os._exit(3)", "it ended: exit code 3"),
        ("import ctypes; ctypes.string_at(0)", "it ended: SIGSEGV"),
        (
            "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n"
            "        held = bytearray(b'x') * (100 << 20)\n        time.sleep(60)\ntime.sleep(60)",
            "its processes together held more than 256 MB",
        ),
    ],
)
def test_what_ends_it_is_told_and_the_next_code_has_a_new_one(small: Interpreter, code: str, said: str) -> None:
    check_that_it_is_new(small, code, said)


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    ],
)
def test_code_without_end_is_ended(small: Interpreter, code: str) -> None:
    small.limits = replace(small.limits, seconds=1.0)
    check_that_it_is_new(small, code, "not done in 1 s")


def check_that_it_is_new(interpreter: Interpreter, code: str, said: str) -> None:
    """That the code ends the interpreter, for the reason that is said, and that nothing of it is there afterwards."""
    before, limits = pids(), interpreter.limits
    ran = interpreter.run(f"print('so far')\nx = 1\n{code}")
    assert (ran.printed.splitlines()[0], ran.lost) == ("so far", said)
    assert gone(before)
    interpreter.limits = replace(limits, seconds=20.0)
    assert "NameError" in str(interpreter.run("x").error)


def test_no_amount_of_output_hurts(interpreter: Interpreter) -> None:
    printed = interpreter.run("print('first')\nfor _ in range(100): print('x' * (1 << 20))\nprint('last')").printed
    assert printed.startswith("first\nxxx")
    assert printed.endswith("xxx\nlast\n")
    assert len(printed) < 1 << 18
    assert "bytes left out]" in printed
    ran = interpreter.run("'x' * (1 << 20)")
    assert len(str(ran.value)) < 1 << 18
    flood = "import os\nwhile True:\n    try: os.write(1, b'x' * 65536)\n    except OSError: pass"
    interpreter.limits = Limits(seconds=0.3)
    interpreter.end()
    assert interpreter.run(flood).lost == "not done in 0.3 s"


def test_between_two_pieces_of_code_nothing_runs(interpreter: Interpreter) -> None:
    before = pids()
    interpreter.run(
        "import subprocess, threading, time\nticks = []\nother = subprocess.Popen(['sleep', '60'])\n"
        "def tick():\n    while len(ticks) < 10_000:\n        ticks.append(1)\n        time.sleep(0.01)\n"
        "threading.Thread(target=tick, daemon=True).start()"
    )
    assert gone(before, but=3), "there are the launcher, process 1 of the sandbox, and the interpreter"
    assert sum(state(pid) == "T" for pid in pids() - before) == 1
    few = int(str(interpreter.run("len(ticks)").value))
    time.sleep(1)
    assert int(str(interpreter.run("len(ticks)").value)) < few + 50
    assert interpreter.run("other.wait(1)").value == "-9"


def test_what_it_writes_where_answers_go_is_not_taken_for_a_later_answer(interpreter: Interpreter) -> None:
    forged = b'{"call": 1, "value": "forged", "error": null}\n'
    interpreter.run(f"import os\nfor n in range(3, 20):\n    try: os.write(n, {forged!r})\n    except OSError: pass")
    assert interpreter.run("1 + 1").value == "2"
    garbage = "import os\nfor n in range(3, 20):\n    try: os.write(n, {!r})\n    except OSError: pass"
    assert interpreter.run(garbage.format(b'\xff[1]\n"\n{"call": 3}\n')).lost is None
    assert interpreter.run("2 + 2").value == "4"


def test_a_process_that_the_code_forks_does_not_answer_too(interpreter: Interpreter) -> None:
    assert interpreter.run("import os\nif os.fork() == 0: raise ValueError\nos.wait()[1] >> 8").value == "0"
    assert interpreter.run("1").value == "1"


DRAWS = """import random, secrets
print(random.random(), secrets.randbits(64), {str(n) for n in range(20)})
import numpy as np
print(np.random.rand(), np.random.default_rng().random())"""


def test_random_numbers_are_those_of_its_seed() -> None:
    drawn = []
    for seed in (1, 1, 2):
        made = Interpreter(Limits(seconds=20.0), seed=seed)
        drawn.append(made.run(DRAWS))
        made.end()
    assert drawn[0].error is None
    assert drawn[0] == drawn[1]
    sets = [one.printed.partition("{")[2].partition("}")[0] for one in drawn]
    numbers = [one.printed.replace(of, "").split() for one, of in zip(drawn, sets, strict=True)]
    assert sets[0] == sets[2]
    assert all(a != b for a, b in zip(numbers[0], numbers[2], strict=True) if a != "{}")


def test_it_outlives_the_thread_that_it_was_started_in(interpreter: Interpreter) -> None:
    """The kernel ends what is to die with its parent when the parent's thread ends."""
    thread = threading.Thread(target=interpreter.run, args=("x = 7",))
    thread.start()
    thread.join()
    time.sleep(0.05)
    assert interpreter.run("x") == Ran("", "7")


def test_nothing_outlives_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = pids()
    made = [Interpreter(Limits()), Interpreter(Limits(), unsafe=True)]
    for one in made:
        one.run("import os, subprocess, sys\nsubprocess.Popen(['sleep', '60'], start_new_session=True)")
    assert gone(before, but=4)
    assert len(list(tmp_path.iterdir())) == 1  # that without a sandbox writes to its folder
    made[0].end()
    del made, one
    assert gone(before)
    assert list(tmp_path.iterdir()) == []


def test_where_the_sandbox_cannot_be_built_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = pids()
    monkeypatch.setattr(cell, "HOME", "/usr/not-here")
    with pytest.raises(RuntimeError, match="the sandbox cannot be built: Read-only file system"):
        Interpreter(Limits()).run("1")
    assert gone(before)


def test_without_a_sandbox_the_limits_hold() -> None:
    made = Interpreter(Limits(seconds=0.5, memory_mb=512), unsafe=True)
    assert made.run("x = 2\nx").value == "2"
    assert "MemoryError" in str(made.run("bytearray(10 << 30)").error)
    assert made.run("while True: pass").lost == "not done in 0.5 s"
    made.end()
