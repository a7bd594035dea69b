"""A worker process in the sandbox: what it can do there, what it cannot, and that it ends with its keeper."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo.errors import UserError
from grpo.processes import tree
from grpo.processes.channel import receive, send
from grpo.processes.child import ChildProcess
from grpo.processes.output import Output
from grpo.processes.sandbox import worker
from grpo.processes.sandbox.worker import Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is a sandbox on Linux only")
SERVER = """import json, os, socket, sys
channel = socket.socket(fileno=int(sys.argv[1]))
sys.path[:0] = [sys.argv[2]]
from grpo.processes.channel import receive, send
while True:
    try: answer = repr(eval(receive(channel)))
    except ConnectionError: break
    except BaseException as error: answer = type(error).__name__
    send(channel, json.dumps(answer).encode())
"""

Ask = Callable[[str], Any]


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a script, which nobody may read too."""
    folder = tmp_path_factory.mktemp("own")
    folder.chmod(0o755)
    (folder / "server.py").write_text(SERVER)
    return folder


@pytest.fixture
def output() -> Iterator[Output]:
    with contextlib.closing(Output("test")) as made:
        yield made


@pytest.fixture
def child(own: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChildProcess]:
    monkeypatch.setattr(worker, "PROCESSES", 32)
    script = own / "server.py"
    made = ChildProcess(script, output, {**os.environ, "MINE": "1"}, 0.5, Sandbox.of("test", [script]))
    yield made
    made.kill()


@pytest.fixture
def ask(child: ChildProcess) -> Ask:
    def asked(expression: str) -> Any:
        send(child.channel, expression.encode(), 20)
        return json.loads(receive(child.channel, 20))

    return asked


def test_it_imports_what_it_needs_and_reads_its_own_folder(ask: Ask, own: Path) -> None:
    (own / "data.txt").write_text("mine")
    assert ask(f"open({str(own / 'data.txt')!r}).read()") == "'mine'"
    assert ask("__import__('numpy').arange(3).sum()") == "np.int64(3)"
    assert ask("__import__('grpo.plugins').plugins.__name__") == "'grpo.plugins'"
    assert ask("os.environ['MINE'], os.environ['HOME'], os.getcwd()") == "('1', '/sandbox', '/sandbox')"


def test_a_folder_in_one_that_is_shown_too(own: Path, output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(own)])
    (own / "above.txt").write_text("above")
    inner = own / "inner"
    inner.mkdir(mode=0o755)
    script = (own / "server.py").rename(inner / "server.py")
    made = ChildProcess(script, output, os.environ, None, Sandbox.of("test", [script]))
    send(made.channel, f"open({str(own / 'above.txt')!r}).read()".encode(), 20)
    assert json.loads(receive(made.channel, 20)) == "'above'"
    made.kill()


def test_it_writes_to_its_temporary_folder_alone(ask: Ask, own: Path) -> None:
    writes = "open({!r}, 'w').write('x')"
    assert ask(writes.format("here")) == ask(writes.format("/sandbox/there")) == "1"
    assert ask("__import__('tempfile').mkdtemp().startswith('/sandbox/')") == "True"
    for place in (folder / f"x-{os.getpid()}" for folder in (own, Path.home(), Path("/tmp"), worker.PACKAGE)):
        assert ask(writes.format(str(place))) in ("OSError", "FileNotFoundError", "PermissionError")
        assert not place.exists()


def test_it_reads_nothing_else_reaches_no_network_and_sees_no_processes(ask: Ask, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "secret").write_text("s3cret")
    for path in (tmp_path / "secret", "/etc/passwd", "/proc/self/environ", Path.home() / ".bashrc"):
        assert ask(f"open({str(path)!r}).read()") == "FileNotFoundError", path
    assert ask("socket.socket()") == "PermissionError"
    assert ask(f"os.kill({os.getpid()}, 0)") == "ProcessLookupError"
    assert ask("os.path.exists('/proc')") == "False"


def test_what_it_starts_is_bounded_and_ends_with_it(child: ChildProcess, ask: Ask) -> None:
    assert ask("__import__('subprocess').Popen(['sleep', '60'], start_new_session=True).pid > 0") == "True"
    below = tree.descendants(child.pid)
    assert len(below) == 4, "the launcher, process 1, the worker, and what it has started"
    child.kill()
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)


def test_it_dies_with_its_keeper_however_that_goes(child: ChildProcess, ask: Ask) -> None:
    assert ask("1") == "1"
    below = tree.descendants(child.pid)
    tree.end(child.pid)
    deadline = time.monotonic() + 5
    while (left := [pid for pid in below if _alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left == []


def test_more_memory_than_it_may_have_ends_it(child: ChildProcess, ask: Ask) -> None:
    with pytest.raises(ConnectionError):
        ask("len(bytearray(b'x') * (1 << 30))")
    assert child.end(5.0)[1], "by its memory"


def test_it_cannot_fork_without_end(child: ChildProcess, ask: Ask) -> None:
    said = ask("max(iter(lambda: os.fork() or __import__('time').sleep(60), None))")
    assert said == "BlockingIOError"
    below = tree.descendants(child.pid)
    assert len(below) < 40
    child.kill()
    assert not any(map(_alive, below))


def test_its_folder_is_gone_as_soon_as_it_runs(
    own: Path, output: Output, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that nothing is left if nobody is there to tidy up."""
    script, folders = own / "server.py", []
    sandbox = Sandbox.of("test", [script])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Sandbox, "command", lambda *given, of=Sandbox.command: folders.append(given[2]) or of(*given))
    made = ChildProcess(script, output, os.environ, None, sandbox)
    send(made.channel, b"1 + 1", 20)
    assert json.loads(receive(made.channel, 20)) == "2"
    assert [Path(folder).parent for folder in folders] == [tmp_path]
    assert list(tmp_path.iterdir()) == []
    made.kill()


def test_the_home_folder_is_not_shown(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(own))
    monkeypatch.setattr(sys, "path", [*sys.path, str(own), str(own.parent), ""])
    shown = Sandbox.of("test", []).readable
    assert not {str(own), str(own.parent)} & {*shown}
    assert str(Path.cwd()) in shown
    with pytest.raises(UserError, match=r"environment 'Game': sandbox: .* contains your home folder: move the file to"):
        Sandbox.of("environment 'Game'", [own / "game.py"])


def test_a_file_that_nobody_may_read_is_told_of(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "is_root", lambda: True)
    (own / "game.py").write_text("")
    (own / "game.py").chmod(0o600)
    with pytest.raises(UserError, match=rf"who cannot read {own}/game.py: run chmod -R o\+rX {own}"):
        Sandbox.of("test", [own / "game.py"])
    own.chmod(0o700)
    with pytest.raises(UserError, match=rf"who cannot read {own}: run chmod"):
        Sandbox.of("test", [own / "server.py"])


def test_where_there_is_no_sandbox_it_says_so_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "missing", lambda: "grpo isolates code only on Linux, not yet on darwin")
    with pytest.raises(
        UserError,
        match=r"test: sandbox: not available here: grpo isolates .* not yet on darwin\. `sandbox: false` runs it as",
    ):
        Sandbox.of("test", [])


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
