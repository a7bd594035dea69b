"""What a worker starts ends with it, wherever it has gone; and memory is limited for all of it together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo.config import RewardConfig
from grpo.processes import keeper, tree
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Rollout, Task, Trajectory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere orphans are not adopted")

ESCAPING = """
import os, subprocess, sys, time
def escape():
    "Starts a process that leaves group, session and parent, and waits until it has."
    code = (
        "import os, time\\n"
        "os.setsid()\\n"
        "if os.fork(): os._exit(0)\\n"
        "open(PIDS, 'a').write(f'{os.getpid()}\\\\n')\\n"
        "time.sleep(60)"
    )
    subprocess.run([sys.executable, "-c", code.replace("PIDS", repr(PIDS))], check=True)
    while not os.path.exists(PIDS) or not open(PIDS).read().endswith("\\n"):
        time.sleep(0.01)
def hangs(completions, **_):
    escape()
    time.sleep(60)
def dies(completions, **_):
    escape()
    os._exit(3)
def ends(completions, **_):
    escape()
    return [1.0] * len(completions)
"""
GREEDY = """
import os, time
CALLS = "completion"
def takes(size):
    held = bytearray(int(size) << 20)
    held[::4096] = b"x" * len(held[::4096])
    time.sleep(0.3)
    return float(size)
def alone(completions, **_):
    return [takes(text) for text in completions]
def children(completions, **_):
    "Two processes, each of which takes what it is told."
    pids = []
    for text in completions * 2:
        pid = os.fork()
        if not pid:
            takes(text)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return [float(text) for text in completions]
def shared(completions, **_):
    "Memory that eight processes share counts once."
    held = bytearray(b"x") * (int(completions[0]) << 20)
    pids = []
    for _ in range(8):
        pid = os.fork()
        if not pid:
            time.sleep(0.3)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return [float(completions[0])]
"""


def gone(pid: int) -> bool:
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text():
            return True
        time.sleep(0.05)
    return False


def group(*texts: str) -> list[Group]:
    rollouts = tuple(Rollout(Trajectory.sampled((1,), None, text, "stop")) for text in texts)
    return [Group(Task(0, "?", (7,), {}), rollouts)]


@pytest.fixture
def escaping(tmp_path: Path) -> tuple[str, Path]:
    (tmp_path / "mine.py").write_text(f"PIDS = {str(tmp_path / 'pids')!r}\n{ESCAPING}")
    return str(tmp_path / "mine.py"), tmp_path / "pids"


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("hangs", "timeout: no answer in 3 s"),
        ("dies", "error: its process ended in this call (exit code 3)"),
        ("ends", ""),
    ],
)
def test_a_process_that_has_left_session_and_parent_is_found(escaping, function: str, said: str) -> None:
    file, pids = escaping
    scorer = Scorer.of([RewardConfig(use=f"{file}:{function}", timeout=3.0, weight=0.0)])
    (scored,) = scorer.score(group("a"))
    escaped = int(pids.read_text())
    failure = scored.rollouts[0].failures.get(function)
    assert str(failure or "").startswith(said)
    if function == "ends":
        assert Path(f"/proc/{escaped}").exists()  # such as a server that later calls need
    scorer.close()
    assert gone(escaped)


TRAINER = """
from grpo.config import RewardConfig
from grpo.scoring.scorer import Scorer
import sys
sys.path.insert(0, {tests!r})
from test_keeper import group
Scorer.of([RewardConfig(use={use!r}, timeout=60.0)]).score(group("a"))
"""


def test_nor_does_it_outlive_a_trainer_that_is_killed(escaping) -> None:
    file, pids = escaping
    code = TRAINER.format(tests=str(Path(__file__).parent), use=f"{file}:hangs")
    trainer = subprocess.Popen([sys.executable, "-c", code])
    try:
        for _ in range(400):
            if pids.exists() and pids.read_text().endswith("\n"):
                break
            time.sleep(0.05)
        below = tree.descendants(trainer.pid)
        assert len(below) >= 3  # keeper, worker, and what has escaped
        assert int(pids.read_text()) in below
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    assert all(gone(pid) for pid in below)


def test_a_worker_whose_keeper_is_killed_ends_too(escaping) -> None:
    file, _ = escaping
    scorer = Scorer.of([RewardConfig(use=f"{file}:ends", weight=0.0)])
    keeper = scorer.rewards["ends"].worker.pid
    (worker,) = tree.descendants(keeper)
    os.kill(keeper, signal.SIGKILL)
    assert gone(worker)
    scorer.close()


@pytest.mark.parametrize("function", ["alone", "children"])
def test_a_call_that_takes_too_much_memory_fails_and_the_next_is_served(tmp_path: Path, function: str) -> None:
    (tmp_path / "mine.py").write_text(GREEDY)
    scorer = Scorer.of([RewardConfig(use=f"{tmp_path}/mine.py:{function}", memory_gb=0.25, weight=0.0)])
    try:
        (scored,) = scorer.score(group("20", "200" if function == "children" else "400", "20"))
    finally:
        scorer.close()
    assert [rollout.scores[function] for rollout in scored.rollouts] == [20.0, None, 20.0]
    said = "error: it used more than memory_gb (0.25) in this call, so its process was killed"
    assert str(scored.rollouts[1].failures[function]) == said


def test_memory_that_processes_share_counts_once(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(GREEDY)
    scorer = Scorer.of([RewardConfig(use=f"{tmp_path}/mine.py:shared", memory_gb=0.25, weight=0.0)])
    try:
        (scored,) = scorer.score(group("100"))
    finally:
        scorer.close()
    assert scored.rollouts[0].scores["shared"] == 100.0


def test_what_ps_says_is_what_the_kernel_says(monkeypatch) -> None:
    """On other systems than Linux there is nothing but `ps`."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import os, time; os.fork(); print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.readline()
    try:
        found, all_of_ours = tree.descendants(child.pid), tree.descendants(os.getpid())
        monkeypatch.setattr(tree, "_has_children_files", lambda: False)
        assert [len(found), tree.descendants(child.pid)] == [1, found]
        assert sorted(tree.descendants(os.getpid())) == sorted(all_of_ours)  # without `ps` itself
        assert tree.use_more_than([child.pid, *found], 1 << 20)
        assert not tree.use_more_than([child.pid, *found], 1 << 33)
        assert not tree.use_more_than([1 << 30], 0)  # it has ended
    finally:
        tree.end(found[0])
        child.kill()
        child.wait()
        child.stdout.close()


def test_however_often_it_is_woken_memory_is_looked_at_now_and_then(monkeypatch) -> None:
    """Where `ps` is asked for the memory, its end wakes the keeper."""
    woken, wake = os.pipe()
    now, looks, ended = [0.0], [], iter([{}] * 20 + [{7: 0}])

    def select(*_):
        now[0] += keeper.INTERVAL / 5
        os.write(wake, b"x")
        return [woken], [], []

    monkeypatch.setattr(keeper, "select", SimpleNamespace(select=select))
    monkeypatch.setattr(keeper, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(keeper.tree, "reap", lambda: next(ended))
    monkeypatch.setattr(keeper.tree, "use_more_than", lambda *_: looks.append(now[0]))
    assert keeper._watch(7, 1, woken) == 0
    assert 4 <= len(looks) <= 5
    os.close(woken)
    os.close(wake)
