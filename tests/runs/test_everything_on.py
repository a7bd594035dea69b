"""A run with everything on that changes which groups a step learns from, and how: resumed to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs.driver import run, same_end
from runs.test_older_groups_in_runs import lags
from runs.test_resume import interrupt_in

SETTINGS = (
    "optim={steps: 6, learning_rate: 0.01, num_minibatches: 2, num_iterations: 2}",
    "adapter.dropout=0.1",
    "rollout={prompts_per_step: 4, num_generations: 4, max_completion_length: 8, top_p: 0.95, reuse: 3}",
    "rollout.dynamic_sampling=1",
    "data.curriculum={hard: 0.5}",
    "rewards=[{use: 'rare.py:reward'}, {use: 'rare.py:bonus', weight: 0.5}]",
    "loss.beta=0.02",
    "checkpoint.every=2",
)


@pytest.fixture
def rare(recipe: Path) -> Path:
    """The recipe with two rewards that few completions get, of which one often says nothing."""
    Path("rare.py").write_text(
        "def reward(completions, **columns):\n"
        "    return [float(sum(map(ord, text)) % 9 == 0) for text in completions]\n"
        "def bonus(completions, **columns):\n"
        "    return [1.0 if sum(map(ord, text)) % 11 == 0 else None for text in completions]\n"
    )
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dapo", "dr_grpo"])
def test_a_run_with_everything_on_goes_on_to_the_bit(rare: Path, loss: str) -> None:
    settings = (*SETTINGS, f"loss.type={loss}")
    run(rare, "output_dir=whole", *settings)
    run(rare, "output_dir=parts", *settings, change=interrupt_in(5, "update"))
    run(rare, "output_dir=parts", *settings, resume=True)
    same_end(Path("whole"), Path("parts"))
    steps = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert 0 < max(max(step) for step in lags("whole")) <= 3
    for step, groups in zip(steps, lags("whole"), strict=True):
        assert step["reuse/groups"] == sum(lag > 0 for lag in groups)
        assert step["num_prompts"] == sum(lag == 0 for lag in groups)
        assert step["policy_lag/max"] == max(groups)
        drawn = sum(value for name, value in step.items() if name.startswith("curriculum/drawn/"))
        assert drawn == pytest.approx(1)
        assert {"kl", "entropy", "clip_ratio/region_mean"} <= set(step)
