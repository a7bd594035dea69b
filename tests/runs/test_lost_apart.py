"""A sampler or a trainer that is lost ends the run, by its name, and the run goes on to the same numbers."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from launching import LAUNCH
from runs.test_lost_ranks import begin, sampled, saved_after, steps_made, wait_for_steps
from training.apart import ONE_OF_EACH, emulated

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.parametrize("victim", [0, 1], ids=["trainer", "sampler"])
def test_a_process_that_is_lost_ends_the_run_which_goes_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, victim: int, how: signal.Signals
) -> None:
    brief = "checkpoint.every=2", ONE_OF_EACH
    processes = begin(2, recipe, "optim.steps=100000", *brief)
    wait_for_steps(processes)
    time.sleep(0.3)
    processes[victim].send_signal(how)
    said = [process.communicate(timeout=60)[1] for process in processes]  # raises for a process that hangs
    assert all(process.returncode != 0 for process in processes)
    (line,) = [line for line in said[1 - victim].splitlines() if line.startswith("grpo:")]
    assert f"process {victim} of 2" in line
    assert "Traceback" not in said[1 - victim]
    saved, last = max(Path("runs/toy/checkpoints").glob("step-*")), max(steps_made())
    assert str(saved) in line
    # A sampler has no moments to save: what the trainer itself saved is there.
    assert saved_after(saved) in ((last, last + 1) if victim == 1 else (last - 1, last, last + 1))
    steps = saved_after(saved) + 3
    for process in begin(2, recipe, f"optim.steps={steps}", *brief, "--resume-changed"):
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, out + err
    emulated(monkeypatch, recipe, "output_dir=whole", f"optim.steps={steps}")
    whole, parts = sampled(Path("whole")), sampled(Path("runs/toy"))
    assert {step: ids for step, ids in whole.items() if step in parts} == parts
    assert steps in parts
