"""What a plan says of settings that a run is too short, or too simple, to make use of."""

from __future__ import annotations

import mlx.core as mx
import pytest

from grpo.config import LossConfig, OptimConfig
from grpo.objective.surrogates import Terms, vespo
from grpo.planning.notes import filter_note, layers_note, notes_on
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare
from grpo.training.schedule import learning_rate

RATIOS = "each rollout has one update, whose ratios are 1: loss.{} have an effect only with optim.num_iterati"


@pytest.mark.parametrize(
    ("overrides", "notes"),
    [
        ([], []),
        (["optim.warmup_steps=10"], ["optim.warmup_steps: cut from 10 to 1, because the run has 2 steps"]),
        (["optim.warmup_steps=1"], []),
        (["optim={steps: 1, warmup_steps: 1}"], ["optim.warmup_steps: cut from 1 to 0, because the run has 1 step"]),
        (["loss.beta=0.1", "adapter.sync_reference_every=1"], []),
        (
            ["loss.beta=0.1", "adapter.sync_reference_every=2"],
            ["adapter.sync_reference_every: 2 does nothing: the run has 2 steps, so the reference stays"],
        ),
        (["loss.epsilon=0.1"], [RATIOS.format("epsilon")]),
        (["loss.off_policy_mask_threshold=1"], [RATIOS.format("off_policy_mask_threshold")]),
        (["loss={type: dppo, epsilon: 0.1, epsilon_high: 0.1}"], []),
        (["loss={type: dppo, off_policy_mask_threshold: 1}"], [RATIOS.format("off_policy_mask_threshold")]),
        (["loss.epsilon=0.1", "adapter.dropout=0.1"], []),
        (
            ["loss.type=vespo", "adapter.dropout=0.1"],
            ["adapter.dropout with loss.type: vespo: its weight depends on the prod"],
        ),
        (["loss.type=vespo"], []),
        (["loss.epsilon=0.1", "optim.num_iterations=2"], []),
        (["loss.epsilon=0.1", "optim.num_minibatches=2"], []),
        (["loss.epsilon=0.1", "rollout.reuse=2"], []),
        (["optim.steps=1", "rollout.reuse=2"], ["rollout.reuse: 2 does nothing: the run has 1 step"]),
    ],
)
def test_notes(recipe, overrides: list[str], notes: list[str]) -> None:
    cfg = load_recipe(recipe, overrides)
    found = list(notes_on(cfg.optim, cfg.rollout, cfg.adapter, cfg.loss))
    assert len(found) == len(notes)
    assert all(note.startswith(said) for note, said in zip(found, notes, strict=True))


def test_a_warmup_longer_than_the_run_leaves_the_last_step_at_the_full_rate(recipe) -> None:
    optim = load_recipe(recipe, ["optim={steps: 4, warmup_steps: 10, learning_rate: 3}"]).optim
    assert [learning_rate(optim, step) for step in range(1, 5)] == [1, 2, 3, 3]
    alone = load_recipe(recipe, ["optim={steps: 1, warmup_steps: 10, learning_rate: 3}"]).optim
    assert learning_rate(alone, 1) == 3


def test_the_plan_says_it(run_cli, recipe) -> None:
    ran = run_cli("train", recipe, "--dry-run", "optim.warmup_steps=10")
    assert (ran.code, ran.err) == (0, "")
    assert "optim.warmup_steps: cut from 10 to 1, because the run has 2 steps" in ran.out


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "loss.importance_sampling_correction (for example token_truncate) would"),
        (["loss.type=vespo"], "(for example token_truncate) would correct"),
        (["loss.importance_sampling_correction=token_mask"], "correction corrects for the difference"),
        (["loss.type=dppo"], "dppo's ratio is relative to that distribution"),
    ],
)
def test_what_filters_mean_is_said_by_the_loss_and_nothing_is_advised_that_is_refused(
    recipe, overrides: list[str], says: str
) -> None:
    assert says in filter_note(load_recipe(recipe, overrides).loss)
    if "would" in says:
        load_recipe(recipe, [*overrides, "loss.importance_sampling_correction=token_truncate"])


def test_the_plan_says_what_filters_mean(run_cli, recipe) -> None:
    told = " ".join(run_cli("train", recipe, "--dry-run", "rollout.top_k=3", "loss.type=dppo").out.split())
    assert "change the distribution that completions" in told
    assert "importance_sampling_correction" not in told


def test_what_noise_makes_of_vespos_weights() -> None:
    """The numbers in the note: ratios whose mean is 1, with a deviation of 1 nat in their logarithm."""
    noise = mx.random.normal((100_000, 1), key=mx.random.key(0)) - 0.5
    cfg, zeros, ones = LossConfig(type="vespo"), mx.zeros(noise.shape), mx.ones(noise.shape)
    weights = [vespo(Terms(ones, zeros, noise, sign * ones, ones), cfg).mean().item() / -sign for sign in (1, -1)]
    assert weights == pytest.approx([0.70, 0.50], abs=0.01)
    silent = vespo(Terms(ones, zeros, zeros, ones, ones), cfg)
    assert mx.allclose(silent, -ones)


@pytest.mark.parametrize(("asked", "said"), [(True, False), (False, False), (2, False), (3, True)])
def test_more_checkpointed_layers_than_there_are_are_said(asked: bool | int, said: bool) -> None:
    note = layers_note(OptimConfig(steps=1, gradient_checkpointing=asked), 2)
    expected = "optim.gradient_checkpointing: 3 is more than this model's 2 layers: all layers are checkpointed"
    assert note == (expected if said else None)


def test_a_run_says_what_its_model_has_too_few_layers_for(recipe) -> None:
    prepared = prepare(load_recipe(recipe, ["optim.gradient_checkpointing=999"]))
    with prepared.opened:
        assert any("gradient_checkpointing: 999 is more than this model's" in note for note in prepared.notes)
