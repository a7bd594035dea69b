"""A process that is killed without warning, again and again, and the run that ends as if it had not been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs.driver import same_end

RUN = """
import os, signal, sys
import grpo
import mlx.core as mx
from grpo.cli import main

fatal, calls = int(sys.argv.pop(1)), 0

def deadly(function, half=lambda *args: None):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == fatal:
            half(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def half_a_file(path, arrays):
    open(path, "wb").write(b"x" * 1000)

write = os.write
os.write = deadly(write, lambda file, data: write(file, data[: len(data) // 2]))
for name in ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir"):
    setattr(os, name, deadly(getattr(os, name)))
mx.save_safetensors = deadly(mx.save_safetensors, half_a_file)
main()
"""
"""Runs `grpo` and kills itself at the so-manieth write to the disk, half-way through it where that can be done."""


def start(recipe: Path, fatal_write: int, *args: str) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(fatal_write), "train", str(recipe), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err


def kill_at_random(recipe: Path, kills: int, seed: int) -> int:
    """Kill and resume a run so many times, at moments and at writes in turn. Returns how many kills came in time."""
    draw, killed = random.Random(seed), 0
    for attempt in range(kills):
        by_write = attempt % 2 == 0
        process = start(recipe, draw.randrange(1, 90) if by_write else 0, "output_dir=parts", "--resume")
        if not by_write:
            time.sleep(draw.uniform(0.5, 2.0))
            process.kill()
        out, err = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), out + err
        killed += process.returncode != 0
    return killed


@pytest.fixture
def long(recipe) -> Path:
    recipe.write_text(
        recipe.read_text().replace("optim: {steps: 2", "optim: {steps: 400, warmup_steps: 3")
        + "eval: {split: train, every: 4, prompts: 2, samples: 2}\nloss: {beta: 0.1}\ncheckpoint: {every: 3, keep: 2}\n"
    )
    return recipe


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_as_if_never_stopped(long) -> None:
    finish(start(long, 0, "output_dir=whole"))
    killed = kill_at_random(long, 20, seed=0)
    finish(start(long, 0, "output_dir=parts", "--resume"))
    assert killed == 20
    same_end(Path("whole"), Path("parts"))
    assert not [path for path in Path("parts").rglob("*.partial")]


@pytest.mark.slow
def test_killed_in_a_write_it_ends_as_if_never_stopped(long) -> None:
    long.write_text(long.read_text().replace("steps: 400", "steps: 6"))
    finish(start(long, 0, "output_dir=whole"))
    assert kill_at_random(long, 1, seed=1) == 1
    finish(start(long, 0, "output_dir=parts", "--resume"))
    same_end(Path("whole"), Path("parts"))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_ends_it_in_order_and_it_goes_on(long, number: int, code: int) -> None:
    process = start(long, 0, "output_dir=parts", "optim.steps=100000")
    metrics, deadline = Path("parts/metrics.jsonl"), time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 4):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (code, False)
    last = len(metrics.read_text().splitlines())
    assert f"stopped after step {last}" in out
    assert Path(f"parts/checkpoints/step-{last:06d}").is_dir()
