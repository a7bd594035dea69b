"""A step that an error ends at any of its moments saves the step before it, and a resume goes on from there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from runs.driver import run, same_end
from runs.test_wholly import EVERY, FULL, saved, steps

from grpo.training import trainer as trainers
from grpo.training.trainer import Trainer

MINIBATCHES = "optim.num_minibatches=2"
RUN = ("optim.steps=3", "checkpoint={every: 100}", "loss.beta=0.1", "adapter.sync_reference_every=1")
BEFORE = ("score", "observe", "batched", "reference", "gradient", "check")
AFTER = ("optimizer", "sync_reference", "step_metrics")


def at(moment: str, monkeypatch, n: int = 2):
    """A change of a run that raises an error when step n comes to a moment, after what is done there is done."""

    def change(trainer: Trainer, _stop) -> None:
        update, policy = trainer.update, trainer.policy
        holder, name = {
            "score": (trainer.scorer, "score"),
            "observe": (trainer.tasks, "observe"),
            "reference": (policy.adapters, "_swap"),
            "gradient": (update, "gradient"),
            "check": (update, "check"),
            "optimizer": (update.optimizer, "update"),
            "sync_reference": (policy.adapters, "sync_reference"),
            "step_metrics": (trainers, "step_metrics"),
        }.get(moment, (trainer, moment))
        begin, does, now = trainer.scorer.begin, getattr(holder, name), [0]

        def begun(step: int) -> None:
            now[0] = step
            begin(step)

        def breaks(*args, **kwargs):
            made = does(*args, **kwargs)
            if now[0] == n:
                raise OSError(errno.ENOSPC, "No space left on device")
            return made

        trainer.scorer.begin = begun
        monkeypatch.setattr(holder, name, breaks)

    return change


@pytest.mark.parametrize(
    "kind",
    [
        ("optim.num_iterations=2", "rollout.dynamic_sampling=2"),
        pytest.param((FULL, MINIBATCHES), marks=pytest.mark.slow),
    ],
)
def test_an_error_at_any_moment_of_a_step_leaves_the_step_before(recipe, kind, monkeypatch, caplog) -> None:
    """Of whole weights those moments cost it that come once the weights begin to move, and that is said."""
    settings = (*RUN, *kind)
    run(recipe, *settings, EVERY, "output_dir=whole")
    for moment in (*BEFORE, *AFTER):
        caplog.clear()
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            run(recipe, *settings, f"output_dir={moment}", change=at(moment, patch))
        lost = FULL in kind and moment in AFTER
        assert ("Step 1 could not be saved: step 2 failed in the middle" in caplog.text) == lost, moment
        assert ("is no intact checkpoint yet, so all steps of this run are lost. A" in caplog.text) == lost, moment
        assert steps(moment) == ([] if lost else ["step-000001"]), moment
        if not lost:
            assert saved(moment, 1) == saved("whole", 1), moment
    run(recipe, *settings, "output_dir=check", resume=True)
    same_end(Path("whole"), Path("check"))
