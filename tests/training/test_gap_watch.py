"""At every step: how far the sampler's logprobs are from the trainer's, and a stop that loses nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from runs.driver import run

import grpo.generation.joined as joined_layers
from grpo.errors import RunError
from grpo.recipes import load_recipe
from grpo.runs.folder import recipe_text
from grpo.runs.prepare import prepare
from grpo.runs.resume import changes
from grpo.training.gap import GapWatch
from grpo.training.update import Update, Updater

MEAN, UNFILTERED = "sampling/sampling_logp_difference/mean", "sampling/unfiltered_logp_difference/mean"


def watch(most: float | None = 30.0, dtype: mx.Dtype = mx.float32, temperature: float = 1.0, **how) -> GapWatch:
    return GapWatch(SimpleNamespace(dtype=dtype, temperature=temperature), most, **how)


@pytest.mark.parametrize(("dtype", "bound"), [(mx.float32, 1e-3), (mx.bfloat16, 3e-2), (mx.float16, 1e-2)])
def test_thirty_times_the_bound_stops(dtype: mx.Dtype, bound: float) -> None:
    one = watch(dtype=dtype)
    assert one.explained.bound == pytest.approx(bound)
    assert f"3.1 times what rounding in {str(dtype)[9:]} explains ({bound:.1g})" in one.explained.said(3.1 * bound)
    one.check(3, {MEAN: 29 * bound})
    with pytest.raises(RunError, match=r"step 4: .*31\.0 times .* beyond 30 times \(optim\.max_logp_difference"):
        one.check(4, {MEAN: 31 * bound})


def test_null_never_stops_and_another_factor_stops_there() -> None:
    watch(None).check(1, {MEAN: 9.0})
    with pytest.raises(RunError, match="beyond 2 times"):
        watch(2.0).check(1, {MEAN: 2.5e-3})


def test_a_nan_of_the_sampler_stops_a_run_and_is_passed_over_by_one_that_never_stops() -> None:
    nan = {MEAN: math.nan}
    with pytest.raises(RunError, match=r"step 1: the sampler's logprobs of some tokens are NaN\. The run stops"):
        watch().check(1, nan)
    watch(None).check(2, nan)


@pytest.mark.each_value
@pytest.mark.parametrize("odd", ["behaviour", "sampler"])
@pytest.mark.parametrize("setting", ["loss.type=dapo", "loss.importance_sampling_correction=token_mask"])
def test_a_step_whose_sampler_gave_a_nan_is_stopped(recipe, odd: str, setting: str) -> None:
    """One token in one row. A correction passes over it (its weight is 1), so the gradient is finite."""
    filters = ["rollout.top_k=3"] if odd == "sampler" else []
    trainer = prepare(load_recipe(recipe, ["loss.beta=1e-3", setting, *filters])).trainer
    rollout = trainer.engine.rollout

    def broken(*args, **kwargs):
        first, *others = rollout(*args, **kwargs)
        columns = first.rollouts[0].trajectory.columns
        columns = {**columns, odd: (math.nan, *columns[odd][1:])}
        one = replace(first.rollouts[0], trajectory=replace(first.rollouts[0].trajectory, columns=columns))
        return [replace(first, rollouts=(one, *first.rollouts[1:])), *others]

    trainer.engine.rollout = broken
    if odd == "behaviour":
        with pytest.raises(RunError, match="of some tokens are NaN"):
            trainer.step(1)
    else:  # the model's own logprobs are there, and are what is held to the bound
        values = trainer.step(1).values
        assert math.isnan(values[MEAN])
        assert values[UNFILTERED] < 1e-4


def test_filters_do_not_count_and_a_low_temperature_magnifies_rounding() -> None:
    watch().check(1, {MEAN: 0.5, UNFILTERED: 1e-6})
    one = watch(temperature=0.1)
    assert one.explained.times(0.02) == pytest.approx(2.0)
    one.check(1, {MEAN: 0.02})
    with pytest.raises(RunError):
        watch().check(1, {MEAN: 1e-6, UNFILTERED: 0.5})


def test_a_step_that_trained_on_nothing_is_passed_over(recipe, monkeypatch) -> None:
    watch().check(1, {})
    skipped = Update(float("nan"), float("nan"), {}, skipped=1)
    monkeypatch.setattr(Updater, "__call__", lambda *_: skipped)
    assert MEAN not in prepare(load_recipe(recipe)).trainer.step(1).values


@pytest.mark.parametrize("setting", ["rollout.top_k=2", "rollout.top_p=0.5", "rollout.repetition_penalty=1.8"])
def test_a_right_model_with_filters_trains(recipe, setting: str) -> None:
    values = prepare(load_recipe(recipe, [setting, "loss.beta=1e-3"])).trainer.step(1).values
    assert values[MEAN] > 0.05
    assert values[UNFILTERED] < 1e-4


def test_without_filters_there_is_one_gap(recipe) -> None:
    values = prepare(load_recipe(recipe, ["loss.beta=1e-3"])).trainer.step(1).values
    assert values[MEAN] < 1e-4
    assert UNFILTERED not in values


def test_a_decoder_that_forgets_the_adapter_in_the_run_is_stopped_and_the_step_before_is_saved(
    recipe: Path, monkeypatch
) -> None:
    def forgetting(trainer, _stop) -> None:
        """From step 2 on the adapter is there for the update alone."""
        step, joined = trainer.step, joined_layers._joined_lora

        def counted(n: int):
            if n == 2:
                kept = {path: 5 + 0 * a if path.endswith("lora_b") else a for path, a in state(trainer).items()}
                trainer.policy.adapters.load_state(kept)
                forget = lambda layers, dtype: {k: a * (k == "a") for k, a in joined(layers, dtype).items()}  # noqa: E731
                monkeypatch.setattr(joined_layers, "_joined_lora", forget)
            return step(n)

        trainer.step = counted

    with pytest.raises(RunError, match="step 2: the sampler's logprobs"):
        run(recipe, "optim.steps=4", "checkpoint.every=100", "loss.beta=1e-3", change=forgetting)
    folder = Path("runs/toy")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001"]
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1]


def state(trainer) -> dict[str, mx.array]:
    return trainer.policy.adapters.state()


def test_a_checkpoint_of_before_a_setting_was_written_with_its_default(recipe: Path) -> None:
    def written(*overrides: str) -> SimpleNamespace:
        return SimpleNamespace(recipe=recipe_text(load_recipe(recipe, overrides)), sources={}, inputs={})

    old = written()
    old.recipe = re.sub(r"\n +max_logp_difference: 30.0", "", old.recipe)
    assert old.recipe != written().recipe
    assert changes(old, written()) == []
    assert changes(old, written("optim.max_logp_difference=5")) == ["optim.max_logp_difference: 30.0 → 5.0"]
    old.recipe = old.recipe.replace("optim:\n", "optim:\n  since_removed: 1\n")
    assert "optim.since_removed: 1 → not set" in changes(old, written())
