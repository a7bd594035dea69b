"""What code in the sandbox tries, and that it gets nowhere; the machine is looked at from outside."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo.config import RewardConfig
from grpo.errors import UserError
from grpo.plugins import find_reward
from grpo.processes.sandbox import runner
from grpo.processes.sandbox.cell import Limits
from grpo.processes.sandbox.runner import Tally, missing, run_tests
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Rollout, Task, Trajectory

needs_sandbox = pytest.mark.skipif(sys.platform != "linux", reason="there is a sandbox on Linux only")
LIMITS = Limits(seconds=30.0)
INHERITED = """import os
for n in range(3, 64):
    try: assert not os.fstat(n).st_size, 'a file of ours'
    except OSError: pass"""
FORGED = """import os
for n in range(3, 20):
    try: os.write(n, b'{"passed": 1, "seal": "", "error": null}')
    except OSError: pass
os._exit(0)"""
FLOOD = """import os
while True:
    for n in range(3, 20):
        try: os.write(n, b'x' * 65536)
        except OSError: pass"""


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sandboxes of this test alone are made: their launchers have it among their arguments."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def tried(code: str, limits: Limits = LIMITS) -> Tally:
    """The verdict on code whose one test is that it has run to its end."""
    return run_tests(f"{code}\nreached = True", ["assert reached"], limits)


def processes_named(marker: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def gone(marker: str) -> bool:
    """Whether soon there is no process with the marker among its arguments."""
    deadline = time.monotonic() + 20
    while processes_named(marker) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not processes_named(marker)


@needs_sandbox
def test_there_is_a_sandbox_here_and_honest_code_passes() -> None:
    assert missing() is None
    assert tried("import json, math, re") == Tally(1, None)


@needs_sandbox
@pytest.mark.parametrize("place", ["/usr/written", "/written", "/etc/written", "{checkout}/written", "/dev/written"])
def test_it_cannot_write_outside(place: str) -> None:
    place = place.format(checkout=Path(__file__).parents[2])
    error = tried(f"open({place!r}, 'w').write('x')").error
    assert error
    assert any(said in error for said in ("Read-only", "No such file", "Permission denied"))
    assert not Path(place).exists()


@needs_sandbox
def test_it_cannot_read_homes_or_other_peoples_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    secret.chmod(0o644)
    beside = Path(sys.prefix).parent / f"grpo-secret-{os.getpid()}"
    for path in (secret, Path.home() / ".bashrc", Path("/etc/passwd"), Path(__file__), beside):
        assert "No such file" in tried(f"open({str(path)!r}).read()").error
    seen = run_tests("import os, pathlib", ["raise Exception(sorted(os.listdir('/tmp') + os.listdir('.')))"], LIMITS)
    assert str(tmp_path.name) not in seen.error


@needs_sandbox
def test_it_reaches_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        dial = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)"
        assert "Operation not permitted" in tried(dial).error
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    for family in ("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"):
        assert (
            "Operation not permitted"
            in tried(f"import socket; socket.socket(socket.{family}, socket.SOCK_DGRAM)").error
        )


@needs_sandbox
def test_it_cannot_fork_without_end_and_nothing_outlives_it(own_folder: Path) -> None:
    marker = f"outlive-{os.getpid()}"
    sleeper = f"[sys.executable, '-c', 'import time; time.sleep(60) # {marker}']"
    daemon = f"import os, sys\nos.fork() or (os.setsid(), os.execv(sys.executable, {sleeper}))"
    assert tried(daemon).passed == 1
    bomb = f"import os\nmarker = {marker!r}\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert tried(bomb, Limits(seconds=2.0)).passed == 0
    counting = (
        "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(60)\n        n += 1\n"
    )
    counting += "except OSError: pass\nassert n < 8, n"
    assert run_tests(counting, ["pass"], Limits(seconds=30.0, processes=8)) == Tally(1, None)
    assert gone(marker)
    assert gone(str(own_folder))


@needs_sandbox
def test_it_cannot_have_ten_gigabytes() -> None:
    assert "MemoryError" in tried("x = bytearray(10 << 30)").error
    assert tried("x = []\nwhile True: x.append(bytearray(1 << 20))").error.startswith("MemoryError")


@needs_sandbox
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.memfd_create('x')", "Operation not permitted"),
        (
            "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            "assert libc.shmget(0, 1 << 30, 0o1600) != -1, os.strerror(ctypes.get_errno())",
            "Operation not permitted",
        ),
        ("import mmap\nkept = []\nwhile True: kept.append(mmap.mmap(-1, 50 << 20))", "Cannot allocate memory"),
    ],
)
def test_there_is_no_memory_that_the_limit_does_not_count(code: str, said: str) -> None:
    assert said in tried(code).error


FAMILY = """import os, time
for n in range({count}):
    if os.fork() == 0:
        held = bytearray(b'x') * ({size} << 20)
        time.sleep(60)
"""
DRIPS = """
for n in range(1000):
    for descriptor in range(3, 20):
        try: os.write(descriptor, b'x')
        except OSError: pass
    time.sleep(0.01)"""


@needs_sandbox
@pytest.mark.parametrize("more", ["time.sleep(60)", DRIPS], ids=["quiet", "noisy"])
def test_all_its_processes_together_have_the_memory_of_one(more: str, own_folder: Path) -> None:
    limits = Limits(seconds=30.0, memory_mb=256)
    said = "its processes together held more than 256 MB"
    assert tried(FAMILY.format(count=6, size=100) + more, limits) == Tally(0, said)
    assert tried(FAMILY.format(count=6, size=20) + "time.sleep(0.2)", limits) == Tally(1, None)
    assert gone(str(own_folder))


@needs_sandbox
def test_memory_that_its_processes_share_counts_once() -> None:
    shared = "held = bytearray(b'x') * (60 << 20)\n" + FAMILY.format(count=6, size=1) + "time.sleep(0.3)"
    assert tried(shared, Limits(seconds=30.0, memory_mb=256)) == Tally(1, None)


@needs_sandbox
def test_it_cannot_fill_the_disk() -> None:
    small = Limits(disk_mb=4)
    assert tried("open('big', 'wb').write(b'x' * (3 << 20))", small).passed == 1
    many = "for n in range(9):\n    open(f'part{n}', 'wb').write(b'x' * (1 << 20))"
    assert "No space left" in tried(many, small).error
    assert tried("open('big', 'wb').write(b'x' * (5 << 20))", small).passed == 0


@needs_sandbox
@pytest.mark.parametrize("code", ["import time; time.sleep(60)", "while True: pass", "import signal; signal.pause()"])
def test_it_cannot_take_longer_than_its_time(code: str) -> None:
    assert tried(code, Limits(seconds=1.0)) == Tally(0, "not done in 1 s")


@needs_sandbox
def test_it_cannot_kill_what_is_outside() -> None:
    for target in (os.getpid(), os.getppid(), -os.getpgid(0)):
        assert "No such process" in tried(f"import os; os.kill({target}, 9)").error
    tried("import os\nos.kill(-1, 9)")  # itself, at most
    tried("import os\nos.kill(os.getppid(), 9)")
    assert tried("") == Tally(1, None)


@needs_sandbox
def test_it_sees_nothing_of_our_environment_and_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    assert tried("import os; assert 's3cret' not in str(os.environ), 'leak'") == Tally(1, None)
    assert "No such file" in tried(f"open('/proc/{os.getpid()}/environ').read()").error
    readable = os.open(__file__, os.O_RDONLY)
    os.set_inheritable(readable, True)
    try:
        assert run_tests(INHERITED, ["pass"], LIMITS).error is None
    finally:
        os.close(readable)


@needs_sandbox
@pytest.mark.parametrize(
    "call",
    [
        "unshare(0x10000000)",
        "mount(b'none', b'/sandbox', b'tmpfs', 0, None)",
        "syscall(PTRACE, 16, 1, 0, 0)",
        "chroot(b'/sandbox')",
        "setuid(0)",
        "syscall(434, 1, 0)",  # pidfd_open
        "syscall(438, 3, 1, 0)",  # pidfd_getfd
    ],
)
def test_it_cannot_gain_anything(call: str) -> None:
    call = call.replace("PTRACE", {"x86_64": "101", "aarch64": "117"}[os.uname().machine])
    code = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.{call} == -1"
    code += "\nassert ctypes.get_errno() == 1"
    assert tried(code) == Tally(1, None)


@needs_sandbox
@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import os; os._exit(113)",  # what the sandbox itself says when it cannot be built
        "import os; os._exit(200)",
        "import os; os.kill(os.getpid(), 40)",
        "import os, json; json.dumps = json.JSONEncoder.encode = os.write = lambda *_: b'1'",
        "raise SystemExit",
        FORGED,
        FLOOD,
        "import os\nos.closerange(0, 100)",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_ending_early_is_no_pass(code: str) -> None:
    assert run_tests(code, ["assert reached"], Limits(seconds=3.0)).passed == 0


@needs_sandbox
@pytest.mark.parametrize(
    "code", [FORGED, "import sys; sys._getframe().f_back.f_locals['seal']", "print(open('/proc/1'))"]
)
def test_a_program_has_no_way_to_its_verdict(code: str) -> None:
    assert run_tests(code, [{"input": "", "output": "7"}], LIMITS).passed == 0


def in_user_namespace(script: str) -> str:
    """What `missing()` says to one who is root of a user namespace only, as in a container without privileges."""
    python = f"{sys.executable} -c 'from grpo.processes.sandbox.runner import missing; print(missing())'"
    ran = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", f"{script} {python}"], capture_output=True, text=True, check=False
    )
    return ran.stdout.strip() or ran.stderr


needs_unshare = pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare")


@needs_sandbox
@needs_unshare
def test_there_is_one_in_a_container_without_privileges() -> None:
    assert in_user_namespace("") == "None"


@needs_sandbox
@needs_unshare
def test_where_namespaces_are_forbidden_there_is_none_and_it_says_so() -> None:
    said = in_user_namespace("echo 0 > /proc/sys/user/max_net_namespaces;")
    assert said == "the sandbox cannot be built: unshare: No space left on device"


def test_where_there_is_no_sandbox_it_refuses_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    missing.cache_clear()
    monkeypatch.setattr(runner.sys, "platform", "darwin")
    try:
        with pytest.raises(
            UserError, match=r"no sandbox: grpo isolates code only on Linux, not yet on darwin.*unsafe: true"
        ):
            Scorer.of([RewardConfig(use="python_tests", isolation="inline")])
    finally:
        missing.cache_clear()
    with contextlib.closing(Scorer.of([RewardConfig(use="python_tests", isolation="inline", kwargs={"unsafe": True})])):
        pass


def test_without_a_sandbox_the_limits_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    code = "import os\nassert 's3cret' not in str(os.environ) and os.listdir('.') == []"
    assert run_tests(code, ["pass"], LIMITS, unsafe=True) == Tally(1, None)
    assert "MemoryError" in run_tests("x = bytearray(10 << 30)", ["pass"], LIMITS, unsafe=True).error
    assert run_tests("while True: pass", ["pass"], Limits(seconds=1.0), unsafe=True).passed == 0


def ended(pid: str) -> bool:
    """Whether a process soon has ended; whoever has to reap it may still be at it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if "Z (zombie)" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it lives until its limits end it")
def test_without_a_sandbox_too_the_code_does_not_outlive_the_time_limit_of_the_reward(tmp_path: Path) -> None:
    code = f"import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(60)"
    settings = {"kwargs": {"unsafe": True, "seconds": 50.0}, "timeout": 2.0, "weight": 0.0}
    with contextlib.closing(Scorer.of([RewardConfig(use="python_tests", **settings)])) as scorer:
        rollouts = (Rollout(Trajectory.sampled((1,), (-0.5,), code, "stop")),)
        (group,) = scorer.score([Group(Task(0, "?", (7,), {"tests": "pass"}), rollouts)])
    assert group.rollouts[0].failures["python_tests"].kind == "timeout"
    assert ended((tmp_path / "pid").read_text())


@needs_sandbox
@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ([{"input": "1"}], "a test of a program needs an input and an output"),
        ([{"input": 1, "output": "1"}], "both texts"),
        (["pass", {"input": "", "output": ""}], "and not both"),
        ([1], "tests are texts of Python"),
        ("assert (", "a test is not valid Python: '(' was never closed"),
    ],
)
def test_tests_that_are_none_are_a_failure_and_no_zero(tests, said: str) -> None:
    reward = find_reward("python_tests")[1]()
    scores = reward(completions=["x = 1"] * 2, tests=[tests, "assert x == 1"], log_extra=lambda *_: None)
    assert said in str(scores[0])
    assert isinstance(scores[0], ValueError)
    assert scores[1] == 1.0
