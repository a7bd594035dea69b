"""A run that cannot be learning says so: after its first step, and by its exit code after its last."""

from pathlib import Path

import mlx.core as mx
import pytest
from runs.driver import run

from grpo.config import Recipe
from grpo.runs.health import trained_on_nothing, warnings_of_first
from grpo.runs.state import RunState
from grpo.telemetry.runs import read_run
from grpo.training.state import TrainerState
from grpo.types import StepMetrics

FINE = {"reward": 0.5, "frac_reward_zero_std": 0.75, "completions/clipped_ratio": 0.5}
CONSTANT = "def reward(completions, **_):\n    return [1.0 for _ in completions]\n"


CUT = "loss.mask_truncated_completions=true"


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


@pytest.mark.parametrize(
    ("step", "updates", "silent", "said"),
    [
        (0, 0, 0, None),
        (3, 1, 2, None),
        (3, 0, 3, "nothing was trained in 3 steps: in none of them did the rewards"),
        (3, 0, 2, "nothing was trained in 3 steps: every update was skipped as not finite"),
    ],
)
def test_a_run_trained_on_nothing_if_no_update_was_applied(step, updates, silent, said) -> None:
    arrays = {"optimizer": {"step": mx.array(updates, mx.uint64)}}
    state = RunState("id", TrainerState(arrays, {"steps_without_signal": silent}), step=step)
    found = trained_on_nothing(state, config())
    assert found is None if said is None else found.startswith(said)


def test_a_run_that_trained_on_nothing_ends_so(recipe, run_cli) -> None:
    Path("digits.py").write_text(CONSTANT)
    ran = run_cli("train", recipe, "optim.num_iterations=2")
    assert ran.code == 1
    assert "grpo: nothing was trained in 2 steps: in none of them did the rewards" in ran.err
    assert "finished, untrained, after step 2" in ran.out
    assert read_run(Path("runs/toy")).state == "untrained"
    again = run_cli("train", recipe, "optim.num_iterations=2", "--resume")  # nothing is left to do, or has changed
    assert (again.code, read_run(Path("runs/toy")).state) == (1, "untrained")


def test_so_does_one_whose_completions_were_all_left_out(recipe, run_cli) -> None:
    """Their rewards differ; none of them ended by itself."""
    Path("digits.py").write_text("def reward(completions, **_):\n    return list(range(len(completions)))\n")
    ran = run_cli("train", recipe, "optim.steps=1", "rollout.max_completion_length=1", CUT)
    assert (ran.code, "or loss.mask_truncated_completions left them out" in ran.err) == (1, True), ran.err


def test_so_does_one_whose_updates_were_all_skipped(recipe, run_cli) -> None:
    Path("odd.py").write_text("def odd(logprobs, batch, cfg):\n    return logprobs / 0\n")
    ran = run_cli("train", recipe, "loss.use=odd.py:odd")
    assert (ran.code, "every update was skipped as not finite" in ran.err) == (1, True), ran.err
    assert list(Path("runs/toy/not_finite").iterdir())


def test_the_first_step_warns_once(recipe, caplog) -> None:
    Path("digits.py").write_text(CONSTANT)
    run(recipe)
    warned = [message for message in caplog.messages if message.startswith("step 1: ")]
    assert ["in no group do the rewards differ" in line for line in warned].count(True) == 1
    caplog.clear()
    run(recipe, "optim.steps=3", changed=True)
    assert not [message for message in caplog.messages if message.startswith("step ")]
