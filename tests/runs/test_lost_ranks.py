"""A process that dies, is stopped or loses its network: the others end, the last step is saved, and a run goes on."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from launching import free_ports
from runs.driver import run

from grpo.backend.links import Member
from grpo.backend.ranks import Ranks
from grpo.backend.watch import Lost, LostRank, Watch
from grpo.errors import LostRankError
from grpo.runs import loop
from grpo.runs.completions import read_completions, stored_steps
from grpo.runs.folder import taken_over

DIED = "process {} of 2 (other) died"


class Fellow(Ranks):
    """One of two processes that does everything, so that the other, which is not there, is not missed."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.size = rank, 2
        self.watch = Watch(rank, [Member("other", 0, "", (), 0, "")] * 2, [])

    def gather(self, mine: Any) -> list[Any]:
        if self.watch is not None and self.watch.loss is not None:
            raise self._lost("")
        return [mine]

    def share(self, items: Any) -> list[Any]:
        return list(items)

    def merge(self, mine: Any) -> list[Any]:
        return list(mine)

    def lose(self, rank: int) -> None:
        """What the thread does when it hears of a loss."""
        assert self.watch is not None
        self.watch._lose(rank, DIED.format(rank), self.watch)  # type: ignore[arg-type]  # in whole sentences
        self.watch._called(signal.SIGUSR2, None)


def losing(ranks: Fellow, lost: int, at: int = 3, before: Callable[[], object] = lambda: None):
    """A change of a trainer for `run`: another process is lost when step `at` is about to be updated."""

    def change(trainer: Any, _stop: object) -> None:
        trainer.ranks, former = ranks, trainer.update

        class Update:
            def __getattr__(self, name: str) -> Any:
                return getattr(former, name)

            def __call__(self, minibatches: Any, step: int) -> Any:
                if step == at:
                    before()
                    ranks.lose(lost)
                return former(minibatches, step)

        trainer.update = Update()

    return change


def test_the_loss_of_a_process_ends_a_step_and_saves_the_one_before(recipe: Path) -> None:
    with pytest.raises(LostRankError) as ended:
        run(recipe, "optim.steps=5", "checkpoint.every=100", change=losing(Fellow(0), 1))
    saved = Path("runs/toy/checkpoints/step-000002")
    assert str(ended.value) == (
        f"process 1 of 2 (other) died. The run is saved in {saved}: continue with --resume, "
        "with any number of processes"
    )
    assert ended.value.speaks
    assert saved.is_dir()
    assert Path("runs/toy/.ended").read_text().startswith("failed\nprocess 1 of 2 (other) died. ")


def test_the_first_process_that_is_left_saves_where_the_first_was_lost(recipe: Path) -> None:
    with pytest.raises(LostRankError, match="process 0 of 2") as ended:
        run(recipe, "optim.steps=5", "checkpoint.every=100", change=losing(Fellow(1), 0))
    assert ended.value.speaks
    assert [path.name for path in Path("runs/toy/checkpoints").iterdir()] == ["step-000002"]


def test_a_process_that_was_cut_off_says_so_and_leaves_the_run_to_the_others(recipe: Path) -> None:
    with pytest.raises(LostRankError, match=r"process 1 of 2 .* No step is saved") as ended:
        run(recipe, "optim.steps=5", "checkpoint.every=100", change=losing(Fellow(1), 1))
    assert ended.value.speaks
    assert not Path("runs/toy/checkpoints").exists()


def test_what_the_first_process_saved_is_not_written_again(recipe: Path) -> None:
    saved = Path("runs/toy/checkpoints/step-000002")

    def save() -> None:
        run(recipe, "output_dir=other", "optim.steps=2")
        shutil.copytree("other/checkpoints", saved.parent)
        os.utime(saved / "state.json", (1, 1))

    with pytest.raises(LostRankError):
        run(recipe, "optim.steps=5", "checkpoint.every=100", change=losing(Fellow(1), 0, before=save))
    assert (saved / "state.json").stat().st_mtime == 1


HOLDS = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True)"


def test_a_first_process_that_still_holds_the_folder_is_left_to_save(recipe: Path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "taken_over", partial(taken_over, seconds=0.1))
    holders: list[subprocess.Popen[bytes]] = []

    def hold() -> None:
        with open("runs/toy/.lock", "a") as file:
            fcntl.lockf(file, fcntl.LOCK_UN)
        command = [sys.executable, "-c", f"{HOLDS}; sys.stdin.read()", "runs/toy/.lock"]
        holders.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert holders[0].stdout is not None
        holders[0].stdout.readline()

    with pytest.raises(LostRankError, match=r"died\. runs/toy: process 0 is still alive and holds"):
        run(recipe, "optim.steps=5", "checkpoint.every=100", change=losing(Fellow(1), 0, before=hold))
    holders[0].communicate()
    assert not Path("runs/toy/checkpoints").exists()


def test_where_a_step_is_stuck_another_thread_saves_the_one_before(recipe: Path) -> None:
    """As of a collective operation that does not come back: the arrays are halfway changed."""
    ranks = Fellow(0)

    def change(trainer: Any, _stop: object) -> None:
        trainer.ranks, sync = ranks, trainer.policy.adapters.sync_reference

        def stuck(cfg: Any, step: int) -> None:
            if step == 3:
                assert ranks.watch is not None
                thread = threading.Thread(target=ranks.watch.last_resort)
                thread.start()
                thread.join()
                raise Lost
            sync(cfg, step)

        trainer.policy.adapters.sync_reference = stuck

    with pytest.raises(LostRankError):
        run(recipe, "optim.steps=5", "checkpoint.every=100", change=change)

    def whole_with(trainer: Any, _stop: object) -> None:
        trainer.ranks = Fellow(0)  # cuts the same micro-batches

    run(recipe, "output_dir=whole", "optim.steps=2", change=whole_with)
    for name in ("adapters", "optimizer"):
        saved, whole = (
            mx.load(f"{folder}/checkpoints/step-000002/{name}.safetensors") for folder in ("runs/toy", "whole")
        )
        assert all(mx.array_equal(saved[path], array) for path, array in whole.items()), name


def test_an_error_of_the_ring_in_a_layer_is_the_loss_and_other_errors_are_their_own(monkeypatch) -> None:
    monkeypatch.setattr("grpo.backend.ranks.HEARD", 0.1)
    ranks = Fellow(0)
    with pytest.raises(LostRankError, match=r"another process was lost \(\[ring\] connection"), ranks.interrupts():
        raise RuntimeError("[ring] connection to a peer was lost")
    with pytest.raises(RuntimeError, match=r"^mine$"), ranks.interrupts():
        raise RuntimeError("mine")

    def fail() -> mx.array:
        raise RuntimeError("a kernel failed")

    with pytest.raises(LostRankError, match="exchange with the others failed, although all are running: a kernel"):
        ranks._exchange(fail)
    assert ranks.watch is not None
    ranks.watch.loss = LostRank(1, "process 1 of 2 (other) died")
    ranks.watch._loss_known.set()
    with pytest.raises(LostRankError, match=r"^process 1 of 2 \(other\) died$"):
        ranks._exchange(lambda: pytest.fail("begun though another process is lost"))


# What follows are real processes, lost at random moments.


class Network:
    """A network name space for each process, on one bridge."""

    def __init__(self, size: int) -> None:
        self.size, self.name = size, f"g{os.getpid() % 10_000}"

    def run(self, line: str) -> None:
        subprocess.run(["ip", *line.split()], check=True, capture_output=True)

    def open(self) -> None:
        self.run(f"link add {self.name}b type bridge")
        self.run(f"link set {self.name}b up")
        for rank in range(self.size):
            space, here, there = f"{self.name}-{rank}", f"{self.name}v{rank}", f"{self.name}p{rank}"
            self.run(f"netns add {space}")
            self.run(f"link add {here} type veth peer name {there}")
            self.run(f"link set {there} netns {space}")
            self.run(f"link set {here} master {self.name}b up")
            self.run(f"-n {space} addr add 10.77.0.{rank + 1}/24 dev {there}")
            for device in (there, "lo"):
                self.run(f"-n {space} link set {device} up")

    def close(self) -> None:
        links = [f"link del {self.name}v{rank}" for rank in range(self.size)]  # a name space goes some time later
        spaces = [f"netns del {self.name}-{rank}" for rank in range(self.size)]
        for line in (*links, *spaces, f"link del {self.name}b"):
            subprocess.run(["ip", *line.split()], check=False, capture_output=True)

    def within(self, rank: int) -> list[str]:
        return ["ip", "netns", "exec", f"{self.name}-{rank}"]

    def cut(self, rank: int) -> None:
        self.run(f"link set {self.name}v{rank} down")


@contextmanager
def network(size: int) -> Iterator[Network]:
    made = Network(size)
    try:
        try:
            made.open()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network can be made here: {error}")
        yield made
    finally:
        made.close()


def begin(
    size: int, recipe: Path, *settings: str, net: Network | None = None, first: str = ""
) -> list[subprocess.Popen[str]]:
    """Processes as `mlx.launch` would start them, without its care for the others when one ends.

    `first` is code that comes before the command.
    """
    port, hosts = free_ports(size), Path("hosts.json")
    named = [f"10.77.0.{rank + 1}:{port}" if net else f"127.0.0.1:{port + rank}" for rank in range(size)]
    hosts.write_text(json.dumps([[name] for name in named]) if size > 1 else "")
    about = {"MLX_HOSTFILE": str(hosts.absolute()), "MKL_NUM_THREADS": "1", "GRPO_RANK_SILENCE": "6"}
    processes = []
    for rank in range(size):
        command = [sys.executable, "-c", f"{first}\nfrom grpo.cli import main; main()", "train", str(recipe), *settings]
        command = [*(net.within(rank) if net else []), *command]
        env = {**os.environ, **about, "MLX_RANK": str(rank)}
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
    return processes


def steps_made() -> list[int]:
    path = Path("runs/toy/metrics.jsonl")
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_steps(processes: list[subprocess.Popen[str]]) -> None:
    """Until two steps are made."""
    deadline = time.monotonic() + 200
    while len(steps_made()) < 2:
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def lose_one(size: int, recipe: Path, kind: str, draw: random.Random, net: Network | None) -> list[str]:
    """Lose a process of a run at a random moment. Returns the lines that ours say, once all have ended."""
    processes = begin(size, recipe, "optim.steps=100000", "checkpoint.every=100000", net=net)
    wait_for_steps(processes)
    time.sleep(draw.uniform(0, 2))
    victim = draw.randrange(size)
    if net is not None:
        net.cut(victim)
    else:
        processes[victim].send_signal(signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    said = [process.communicate(timeout=60)[1] for process in processes]  # raises for a process that hangs
    assert all(process.returncode != 0 for process in processes)
    assert not any("Traceback" in one for one in said), said
    return [line for one in said for line in one.splitlines() if line.startswith("grpo:")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "stop", "cut"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("seed", range(int(os.environ.get("GRPO_MOMENTS", "1"))))
def test_lost_at_a_random_moment_a_run_is_saved_and_goes_on(recipe: Path, size: int, kind: str, seed: int) -> None:
    """With `GRPO_MOMENTS=4`, at four moments for each size and kind of loss."""
    recipe.write_text(recipe.read_text().replace("prompts_per_step: 2", "prompts_per_step: 4"))
    draw = random.Random(f"{size} {kind} {seed}")
    if kind == "cut":
        with network(size) as net:
            lines = lose_one(size, recipe, kind, draw, net)
    else:
        lines = lose_one(size, recipe, kind, draw, None)
    assert len(lines) == (2 if kind == "cut" else 1), lines  # on both sides of a cut
    saved, last = max(Path("runs/toy/checkpoints").glob("step-*")), max(steps_made())
    assert saved_after(saved) in (last, last + 1)  # the others may have made a step that the first one has not
    assert any(str(saved) in line for line in lines)
    other, steps = draw.choice([1, 2, 4]), last + 3
    for process in begin(other, recipe, f"optim.steps={steps}", "--resume-changed"):
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, out + err
    unsaid = {last + 1} if saved_after(saved) > last else set()  # made, and the first process had not yet said it
    assert set(range(1, steps + 1)) - set(steps_made()) <= unsaid
    run(recipe, "output_dir=whole", f"optim.steps={steps}")
    whole, parts = sampled(Path("whole")), sampled(Path("runs/toy"))
    assert {step: ids for step, ids in whole.items() if step in parts} == parts
    assert steps in parts


UNCUT = """
import grpo.backend.watch as watch
watch.cut_ring, watch._end_stopped, watch.GRACE = (lambda: None), (lambda *_: False), 3.0
"""
"""As where MLX connects processes by other means than the ring, and on several machines."""


@pytest.mark.slow
def test_where_mlx_cannot_be_woken_the_process_is_ended_with_the_last_step_saved(recipe: Path) -> None:
    processes = begin(2, recipe, "optim.steps=100000", "checkpoint.every=100000", first=UNCUT)
    wait_for_steps(processes)
    processes[1].send_signal(signal.SIGSTOP)
    _, said = processes[0].communicate(timeout=60)
    processes[1].kill()
    processes[1].communicate()
    assert processes[0].returncode == 1
    lines = [line for line in said.splitlines() if line.startswith("grpo:")]
    assert len(lines) == 1
    assert "has been silent for 6 s: it is stopped, or its machine or network is down" in lines[0]
    (saved,), last = Path("runs/toy/checkpoints").glob("step-*"), max(steps_made())
    assert saved_after(saved) == last
    run(recipe, f"optim.steps={last + 1}", resume=True, changed=True)
    assert steps_made() == list(range(1, last + 2))


HOLDING = """
import ctypes, os
from grpo.training.trainer import Trainer
step = Trainer.step
def held(self, number):
    if number == 2 and os.environ["MLX_RANK"] == "1":
        ctypes.PyDLL(None).sleep(15)  # with Python's lock
    return step(self, number)
Trainer.step = held
"""
"""Code in one process that lets no thread have its turn, for longer than the silence after which one is lost."""


@pytest.mark.slow
def test_a_process_whose_code_holds_the_lock_of_python_is_not_lost(recipe: Path) -> None:
    processes = begin(2, recipe, "optim.steps=3", first=HOLDING)
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert steps_made() == [1, 2, 3]
    assert "process 1 of 2" in said[0]
    assert "has been silent for 6 s, but still runs" in " ".join(said[0].split())


def saved_after(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def sampled(folder: Path) -> dict[int, list[Any]]:
    """The token ids that were sampled, by the step."""
    read = (read_completions(path) for path in stored_steps(folder / "completions"))
    return {step: [[one.trajectory.token_ids for one in group.rollouts] for group in groups] for step, groups in read}
