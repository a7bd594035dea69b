"""A step is made wholly or not at all, though whole weights are held only once: what each way of ending it saves."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from runs.driver import run, same_end

from grpo.errors import RunError
from grpo.model.adapters import Adapters
from grpo.runs.folder import ENDED
from grpo.training import optimizer as optimizers
from grpo.training.trainer import Trainer

FULL, EVERY, TWICE = "adapter.type=full", "checkpoint={every: 1, keep: 9}", "optim.num_iterations=2"
STEPS = ("optim.steps=3", "checkpoint={every: 100}")
LOSS = """
import os, signal
def loss(logprobs, batch, cfg):
    if os.path.exists("break"):
        os.remove("break")
        {what}
    return -batch.advantages * logprobs
"""
RAISES, ASKS = "raise ValueError('mine')", "os.kill(os.getpid(), signal.SIGTERM)"


def saved(folder: str, step: int) -> dict[str, object]:
    """What a checkpoint holds of the run's arrays and counts."""
    path = Path(folder) / f"checkpoints/step-{step:06d}"
    arrays = {file.name: file.read_bytes() for file in path.glob("*.safetensors")}
    assert {"adapters.safetensors", "optimizer.safetensors"} <= set(arrays)
    state = json.loads((path / "state.json").read_text())
    return {**arrays, **{name: state[name] for name in ("step", "counts", "best", "after")}}


def steps(folder: str) -> list[str]:
    return sorted(path.name for path in (Path(folder) / "checkpoints").glob("step-*"))


def at_step(n: int, does):
    """A change of a run that calls `does(trainer, stop)` when step n begins."""

    def change(trainer: Trainer, stop) -> None:
        step = trainer.step

        def stepped(number: int):
            if number == n:
                does(trainer, stop)
            return step(number)

        trainer.step = stepped

    return change


@pytest.fixture(autouse=True)
def one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parameters of the toy move together, as on a GPU."""
    monkeypatch.setattr(optimizers, "TOGETHER", optimizers.GROUP)


def breaks_at_update(number: int, does):
    """A change of a run that calls `does(stop)` in the middle of the optimizer's so-manieth call."""

    def change(trainer: Trainer, stop) -> None:
        optimizer, calls = trainer.update.optimizer, []
        move = optimizer._move

        def moved(*args):
            made = move(*args)
            calls.append(1)
            if len(calls) == number:
                does(stop)
            return made

        optimizer._move = moved

    return change


def out_of_memory(_stop) -> None:
    raise RuntimeError("[malloc] out of memory")


@pytest.mark.parametrize(("settings", "what"), [((FULL,), RAISES), ((FULL,), ASKS), ((), RAISES)])
def test_what_ends_a_step_before_its_first_update_saves_the_step_before(recipe, settings, what: str) -> None:
    """In the middle of a trace, which leaves arrays in the model that hold nothing."""
    Path("mine.py").write_text(LOSS.format(what=what))
    settings = (*settings, "loss.use='mine.py:loss'", "optim.compile=true", "data.prompt='{question} now'")
    run(recipe, *settings, *STEPS, EVERY, "output_dir=whole")

    def retraced(trainer: Trainer, _stop) -> None:
        gradients = trainer.update.gradients
        gradients._accumulate = gradients._accumulated  # the loss is called again, compiled or not
        Path("break").touch()

    change = at_step(2, retraced)
    if what == RAISES:
        with pytest.raises(RunError, match="mine"):
            run(recipe, *settings, *STEPS, change=change)
    else:

        def asked(trainer: Trainer, stop) -> None:
            stop.__enter__()
            change(trainer, stop)

        try:
            assert run(recipe, *settings, *STEPS, change=asked).stopped_by == signal.SIGTERM
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert not Path("break").exists()
    assert steps("runs/toy") == ["step-000001"]
    assert saved("runs/toy", 1) == saved("whole", 1)


def test_a_compiled_trace_that_breaks_leaves_nothing_in_the_model(recipe) -> None:
    Path("mine.py").write_text(LOSS.format(what=RAISES))
    settings = (FULL, "loss.use='mine.py:loss'", "optim.compile=true")
    Path("break").touch()
    seen = {}

    def change(trainer: Trainer, _stop) -> None:
        seen["trainer"], seen["before"] = trainer, trainer.arrays()

    with pytest.raises(RunError, match="mine"):
        run(recipe, *settings, change=change)
    after = seen["trainer"].arrays()
    for name, arrays in seen["before"].items():
        assert all(mx.array_equal(after[name][path], array) for path, array in arrays.items())


@pytest.mark.parametrize("settings", [(FULL, TWICE), ()])
def test_a_signal_in_the_middle_of_an_update_waits_for_the_step_which_is_kept(recipe, settings) -> None:
    run(recipe, *settings, *STEPS, EVERY, "output_dir=whole")
    updates = 2 if TWICE in settings else 1  # of one group of arrays each

    def asks(stop) -> None:
        stop._note(signal.SIGTERM, None)

    former = signal.getsignal(signal.SIGTERM)
    ended = run(recipe, *settings, *STEPS, change=breaks_at_update(updates + 1, asks))
    assert signal.getsignal(signal.SIGTERM) is former
    assert (ended.stopped_by, ended.state.step) == (signal.SIGTERM, 2)
    assert saved("runs/toy", 2) == saved("whole", 2)
    run(recipe, *settings, *STEPS, resume=True)
    same_end(Path("whole"), Path("runs/toy"))


@pytest.mark.parametrize("settings", [(TWICE,), ("loss.beta=0.1", "adapter.sync_reference_every=1")])
def test_an_adapter_is_put_back_when_its_update_breaks(recipe, settings, monkeypatch) -> None:
    run(recipe, *settings, *STEPS, EVERY, "output_dir=whole")
    monkeypatch.setattr(optimizers, "TOGETHER", 1)  # an array a group
    arrays = 28  # of the toy's adapter
    updates = 2 if TWICE in settings else 1
    with pytest.raises(RuntimeError, match="out of memory"):
        run(recipe, *settings, *STEPS, change=breaks_at_update(updates * arrays + 3, out_of_memory))
    assert saved("runs/toy", 1) == saved("whole", 1)


def test_an_adapter_is_put_back_when_a_later_update_of_a_step_is_not_finite(recipe) -> None:
    settings = (TWICE, "optim.max_skipped_updates=1")
    run(recipe, *settings, *STEPS, EVERY, "output_dir=whole")

    def change(trainer: Trainer, _stop) -> None:
        gradient, calls = trainer.update.gradient, []

        def broken(*args):
            calls.append(1)
            found = gradient(*args)
            return replace(found, loss=math.nan) if len(calls) == 4 else found

        trainer.update.gradient = broken

    with pytest.raises(RunError, match="not finite"):
        run(recipe, *settings, *STEPS, change=change)
    assert saved("runs/toy", 1) == saved("whole", 1)


def test_whole_weights_that_an_error_left_in_the_middle_are_not_saved_and_that_is_said(recipe, caplog) -> None:
    settings = (FULL, "optim.steps=5")
    run(recipe, *settings, EVERY, "output_dir=whole")
    with pytest.raises(RuntimeError, match="out of memory"):
        run(recipe, *settings, "checkpoint.every=2", change=breaks_at_update(4, out_of_memory))
    assert steps("runs/toy") == ["step-000002"]
    assert saved("runs/toy", 2) == saved("whole", 2)
    assert (
        "Step 3 could not be saved: step 4 failed in the middle of its update of the weights, and a run with "
        "adapter.type: full holds only one copy of them; the newest intact checkpoint is "
        "runs/toy/checkpoints/step-000002"
    ) in caplog.text
    assert (Path("runs/toy") / ENDED).read_text() == "failed\nRuntimeError: [malloc] out of memory\n"
    run(recipe, *settings, "checkpoint.every=2", resume=True)
    assert saved("runs/toy", 5) == saved("whole", 5)


def test_nothing_is_lost_nor_said_where_the_step_before_is_saved_already(recipe, caplog) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        run(recipe, FULL, "optim.steps=3", EVERY, change=breaks_at_update(2, out_of_memory))
    assert steps("runs/toy") == ["step-000001"]
    assert "could not be saved" not in caplog.text


def test_a_signal_in_the_middle_of_a_switch_of_states_leaves_the_policy(recipe, monkeypatch) -> None:
    """What is saved is the policy, not a half of the reference."""
    settings = ("loss.beta=0.1", FULL)
    run(recipe, *settings, *STEPS, EVERY, "output_dir=whole")
    load_state, halves = Adapters.load_state, []

    def halved(self, state) -> None:
        if halves:
            load_state(self, dict(list(state.items())[: halves.pop()]))
            raise KeyboardInterrupt
        load_state(self, state)

    monkeypatch.setattr(Adapters, "load_state", halved)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, *settings, *STEPS, change=at_step(2, lambda *_: halves.append(5)))
    assert saved("runs/toy", 1) == saved("whole", 1)


def test_a_signal_that_a_custom_loss_swallows_stops_before_the_first_update(recipe) -> None:
    Path("mine.py").write_text(
        LOSS.format(what="try: os.kill(os.getpid(), signal.SIGINT)\n        except BaseException: pass")
    )
    settings = (FULL, "loss.use='mine.py:loss'", "optim.compile=false")
    applied = []

    def change(trainer: Trainer, stop) -> None:
        stop.__enter__()
        update = trainer.update.optimizer.update
        trainer.update.optimizer.update = lambda *args: (applied.append(1), update(*args))
        at_step(2, lambda *_: Path("break").touch())(trainer, stop)

    former = signal.getsignal(signal.SIGINT)
    try:
        ended = run(recipe, *settings, *STEPS, change=change)
    finally:
        signal.signal(signal.SIGINT, former)
    assert (ended.stopped_by, ended.state.step, len(applied)) == (signal.SIGINT, 1, 1)
