"""Runs that learn from older groups: resumed to the bit, stored with their lag, made again, and divided."""

import json
from pathlib import Path

import pytest
from runs.driver import run, same_end
from runs.test_resume import interrupt_in

from grpo.config.rewards import RewardConfig
from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.completions import read_completions, stored_steps
from grpo.runs.resume import find_start
from grpo.tools.replay import replay
from grpo.tools.rescore import rescore

SETTINGS = (
    "optim.steps=6",
    "optim.learning_rate=0.01",
    "rollout={prompts_per_step: 4, num_generations: 4, max_completion_length: 8, reuse: 3}",
    "rewards=[{use: 'rare.py:reward'}]",
    "checkpoint.every=2",
)


@pytest.fixture
def rare(recipe) -> Path:
    """The recipe with a reward that few completions get."""
    Path("rare.py").write_text(
        "def reward(completions, **columns):\n"
        "    return [float(sum(map(ord, text)) % 9 == 0) for text in completions]\n"
    )
    return recipe


def lags(folder: str) -> list[list[int]]:
    """Of each step the lags of its groups."""
    return [[group.lag for group in read_completions(path)[1]] for path in stored_steps(Path(folder) / "completions")]


@pytest.mark.slow
def test_a_resumed_run_replays_what_it_would_have_replayed(rare) -> None:
    run(rare, "output_dir=whole", *SETTINGS)
    run(rare, "output_dir=parts", *SETTINGS, change=interrupt_in(5, "update"))
    run(rare, "output_dir=parts", *SETTINGS, resume=True)
    same_end(Path("whole"), Path("parts"))
    assert (Path("whole/checkpoints/step-000006/older_groups.safetensors")).exists()
    assert max(lags("whole")[4]) > 0
    assert all(max(step) <= 3 for step in lags("whole"))
    steps = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert [step["reuse/groups"] for step in steps] == [sum(lag > 0 for lag in step) for step in lags("whole")]
    made = replay(Path("whole"), 5)
    assert "its completions are those that the run stored" in made.notes
    assert [group.lag for group in made.metrics.groups] == lags("whole")[4]
    again = rescore(Path("whole"), RewardConfig(use="rare.py:reward"), None)
    assert len(again.completions) == 6 * 4 * 4  # none twice
    assert all(one.before == one.now for one in again.completions)


def test_what_another_reward_scored_is_not_replayed(rare) -> None:
    run(rare, "output_dir=whole", *SETTINGS, "optim.steps=4")
    for changed, kept in (("optim.learning_rate=0.02", True), ("rollout.temperature=0.5", False)):
        start = find_start(load_recipe(rare, ["output_dir=whole", *SETTINGS, changed]), changed=True)
        assert ("older_groups" in start.state.trainer.arrays) == kept
    with pytest.raises(UserError, match=r"rollout\.reuse: 3 → 2"):
        find_start(load_recipe(rare, ["output_dir=whole", *SETTINGS, "rollout.reuse=2"]), resume=True)
