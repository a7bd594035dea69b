"""A run that cannot be learning says so: after its first step, and by its exit code after its last."""

from pathlib import Path

import pytest
from training.runs import run

from grpo.config import Recipe
from grpo.telemetry.runs import read_run
from grpo.training.health import trained_on_nothing, warnings_of_first
from grpo.training.state import RunState, TrainerState
from grpo.training.trainer import Trainer
from grpo.types import StepMetrics

FINE = {"reward": 0.5, "frac_reward_zero_std": 0.75, "completions/clipped_ratio": 0.5}
CONSTANT = "def reward(completions, **_):\n    return [1.0 for _ in completions]\n"


def config() -> Recipe:
    return Recipe.model_validate(
        {"model": {"name": "m"}, "data": {"source": "d"}, "rewards": ({"use": "exact"},), "optim": {"steps": 9}}
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, []),
        ({"completions/clipped_ratio": 0.75}, ["75% of the completions were cut off"]),
        ({"frac_reward_zero_std": 1.0}, ["in no group do the rewards differ (their mean is 0.5)"]),
        ({"reward": None, "frac_reward_zero_std": 1.0}, ["no completion has a reward"]),
        (
            {"completions/clipped_ratio": 1.0, "reward": 0.0, "frac_reward_zero_std": 1.0},
            ["100% of the completions", "their mean is 0)"],
        ),
    ],
)
def test_what_the_first_step_says(values: dict, said: list[str]) -> None:
    metrics = StepMetrics(1, {name: value for name, value in (FINE | values).items() if value is not None})
    lines = warnings_of_first(metrics, config())
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))


def test_a_run_trained_on_nothing_if_no_step_had_a_signal() -> None:
    def state(step: int, **counts: int) -> RunState:
        return RunState("id", TrainerState({}, counts), step=step)

    assert trained_on_nothing(state(0)) is None
    assert trained_on_nothing(state(3)) is None
    assert trained_on_nothing(state(3, steps_without_signal=2)) is None
    assert "nothing was trained in 3 steps" in trained_on_nothing(state(3, steps_without_signal=3))


@pytest.fixture
def silent(monkeypatch) -> None:
    """The trainer counts every step as one without a signal."""
    state, step, made = Trainer.state, Trainer.step, []

    def stepped(self: Trainer, n: int) -> StepMetrics:
        made.append(n)
        return step(self, n)

    def counted(self: Trainer) -> TrainerState:
        found = state(self)
        return TrainerState(found.arrays, {**found.counts, "steps_without_signal": len(made)})

    monkeypatch.setattr(Trainer, "step", stepped)
    monkeypatch.setattr(Trainer, "state", counted)


def test_a_run_that_trained_on_nothing_ends_so(recipe, run_cli, silent) -> None:
    Path("digits.py").write_text(CONSTANT)
    ran = run_cli("train", recipe)
    assert ran.code == 1
    assert "grpo: nothing was trained in 2 steps" in ran.err
    assert "finished, untrained, after step 2" in ran.out
    assert read_run(Path("runs/toy")).state == "untrained"
    again = run_cli("train", recipe, "--resume")  # nothing is left to do, and nothing has changed
    assert (again.code, read_run(Path("runs/toy")).state) == (1, "untrained")


def test_the_first_step_warns_once(recipe, caplog) -> None:
    Path("digits.py").write_text(CONSTANT)
    run(recipe)
    warned = [message for message in caplog.messages if message.startswith("step 1: ")]
    assert ["in no group do the rewards differ" in line for line in warned].count(True) == 1
    caplog.clear()
    run(recipe, "optim.steps=3", changed=True)
    assert not [message for message in caplog.messages if message.startswith("step ")]
