"""Runs that go on with a curriculum: to the bit, without the file that it began with, and over changed settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs.driver import run, same_end
from runs.test_curricula import stop_after, told

from grpo.config import DataConfig
from grpo.data.loading import load_rows
from grpo.data.rates import SolveRates
from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.drawing import gone_rates
from grpo.runs.prepare import prepare
from grpo.runs.resume import find_start
from grpo.runs.state import RunState
from grpo.tools.replay import replay
from grpo.training.state import TrainerState

FILE = Path("rates.jsonl")
POOLED = ("data.solve_rates=rates.jsonl", "data.curriculum={hard: 0.5, hard_threshold: 0.1, easy_threshold: 0.2}")
STEPS = ("optim.steps=4", "checkpoint.every=4")


@pytest.fixture
def rated(recipe) -> Path:
    """The recipe with a file of solve rates for three of its four rows."""
    SolveRates.of({0: 0.0, 2: 0.15, 3: 1.0}, load_rows(load_recipe(recipe).data), {}).write(FILE)
    return recipe


def test_a_file_that_only_began_the_curriculum_may_go(rated) -> None:
    """With older groups, too, whose replays are not observed again."""
    settings = (*POOLED, *STEPS, "rollout.reuse=2")
    run(rated, "output_dir=whole", *settings)
    run(rated, "output_dir=parts", *settings, change=stop_after(2))
    FILE.unlink()
    run(rated, "output_dir=parts", *settings, resume=True)
    same_end(Path("whole"), Path("parts"))
    assert "its completions are those that the run stored" in replay(Path("parts"), 3).notes
    with pytest.raises(UserError, match=r"data\.solve_rates .*rates\.jsonl: No such file"):
        replay(Path("whole"), 3)  # no checkpoint has the rates: one was written after step 4
    with pytest.raises(UserError, match=r"data\.solve_rates .*rates\.jsonl: No such file"):
        prepare(load_recipe(rated, settings))  # a run that begins needs it


def test_a_file_that_says_which_rows_are_trained_on_may_not(rated) -> None:
    settings = (*POOLED, *STEPS, "data.solve_rate=[0, 0.5]")
    run(rated, "output_dir=whole", *settings)
    run(rated, "output_dir=parts", *settings, change=stop_after(2))
    kept = FILE.read_text()
    FILE.unlink()
    with pytest.raises(UserError, match=r"data\.solve_rates .*rates\.jsonl: No such file"):
        run(rated, "output_dir=parts", *settings, resume=True)
    FILE.write_text(kept)
    run(rated, "output_dir=parts", *settings, resume=True)
    same_end(Path("whole"), Path("parts"))


def test_changed_settings_of_pools_keep_what_was_learnt(rated) -> None:
    run(rated, "output_dir=parts", *POOLED, *STEPS, change=stop_after(2))
    before = told("parts")[-1]
    others = (*POOLED, *STEPS, "data.curriculum.hard_threshold=0", "data.curriculum.easy_threshold=1")
    with pytest.raises(UserError, match=r"data\.curriculum\.easy_threshold: 0\.2 → 1"):
        find_start(load_recipe(rated, ["output_dir=parts", *others]), resume=True)
    run(rated, "output_dir=parts", *others, changed=True)
    after = told("parts")[-1]
    assert before["curriculum/easy"] > 0 == after["curriculum/easy"]
    assert after["curriculum/unseen"] <= before["curriculum/unseen"]


def test_when_a_file_is_not_needed() -> None:
    """Only a state that has the rates stands in for the file, and it does not say which rows are trained on."""
    learnt, stream = (
        RunState("id", TrainerState({}, {"tasks": tasks})) for tasks in ({"solve_rates": []}, {"cursor": 0})
    )
    pooled = DataConfig(source="rows", solve_rates="gone.jsonl", curriculum={})
    chosen = DataConfig(source="rows", solve_rates="gone.jsonl", solve_rate=(0, 1), curriculum={})
    there = DataConfig(source="rows", solve_rates=__file__, curriculum={})
    assert gone_rates(pooled, learnt) == ["data"]
    assert gone_rates(pooled, stream) == gone_rates(chosen, learnt) == gone_rates(there, learnt) == []


@pytest.mark.slow
def test_the_file_of_one_of_several_sources_may_go_too(rated) -> None:
    text = rated.read_text().replace(
        'data: {source: train.jsonl, prompt: "{question}"}',
        """data: {prompt: "{question}", sources: [
  {source: train.jsonl, name: plain},
  {source: train.jsonl, name: pooled, solve_rates: rates.jsonl, curriculum: {hard: 0.5, hard_threshold: 0.1}}]}""",
    )
    rated.write_text(text)
    run(rated, "output_dir=whole", *STEPS)
    run(rated, "output_dir=parts", *STEPS, change=stop_after(2))
    FILE.unlink()
    run(rated, "output_dir=parts", *STEPS, resume=True)
    same_end(Path("whole"), Path("parts"))
    with pytest.raises(UserError, match=r"solve_rates .*rates\.jsonl: No such file"):
        prepare(load_recipe(rated))
