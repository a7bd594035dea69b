"""Trajectories with untrained tokens in the middle: the model sees them; nothing learns from them or counts them."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from objective.oracle import PAPER, weights
from training.holes import (
    GARBAGE,
    LONGEST,
    MASKS,
    TOTALS,
    cut,
    everywhere,
    made,
    rows,
)
from training.sections import (
    make_batches,
    make_minibatches,
    updater,
    with_advantages,
    with_reference,
)
from training.test_update import difference
from training.test_update import recipe as sections

from grpo.presets import PRESETS
from grpo.types import BEHAVIOUR, SAMPLER, Totals, Trajectory


def test_a_column_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="trained has 1 values for 2 tokens"):
        Trajectory((1, 2), (True,), {}, "", "stop")
    with pytest.raises(ValueError, match="behaviour has 3 values for 2 tokens"):
        Trajectory.sampled((1, 2), (0.0,) * 3, "", "stop")


def test_what_a_trajectory_counts() -> None:
    trajectory = Trajectory((1, 2, 3), (True, False, True), {BEHAVIOUR: (-1.0, math.nan, -2.0)}, "", "stop")
    assert trajectory.trained_tokens == 2
    assert trajectory.of_trained(trajectory.behaviour) == [-1.0, -2.0]
    assert trajectory.sampler is None
    assert Trajectory.sampled((1, 2), None, "", "stop").trained == (True, True)


@pytest.mark.parametrize("kind", PRESETS)
def test_masks_and_weights_of_batches(make_policy, kind: str) -> None:
    """Each row's mask is `trained`, wherever it stands; its weights are the oracle's of the whole step."""
    policy, cfg = make_policy().policy, sections(loss={"type": kind, "entropy_coef": 0.1})
    local = cfg.loss.preset.normalize == "micro_batch"
    cfg = sections(loss={"type": kind, "entropy_coef": 0.1}, optim={"micro_batch_tokens": 999 if local else 20})
    groups = with_advantages(made(policy), cfg)
    assert Totals.of(groups) == TOTALS
    mask = np.zeros((6, LONGEST))
    for i, text in enumerate(text for masks in MASKS for text in masks):
        mask[i, : len(text)] = [kind == "s" for kind in text]
    expected = {
        rollout.trajectory.token_ids: (mask[i], weight, rollout.advantage)
        for i, ((_, rollout), weight) in enumerate(
            zip(rows(groups), weights(mask, PAPER[kind][2], LONGEST), strict=True)
        )
    }
    batches = make_batches(groups, cfg)
    assert len(batches) == 1 if local else len(batches) > 2
    for batch in batches:
        for ids, *columns in zip(batch.token_ids, batch.trained, batch.weights, batch.advantages, strict=True):
            own = next(key for key in expected if list(key) == ids[: len(key)].tolist())
            row, weight, advantage = expected.pop(own)
            for found, wanted in zip(columns, (row, weight, row * advantage), strict=True):
                np.testing.assert_allclose(found, wanted[: len(found)], atol=1e-6)
                assert not wanted[len(found) :].any()
    assert not expected


def test_shapes_hold_what_is_not_trained_too(make_policy) -> None:
    """It goes through the model: lengths of micro-batches are those of all tokens."""
    policy, cfg = make_policy().policy, sections(optim={"micro_batch_tokens": 999})
    (batch,) = make_batches(with_advantages(made(policy), cfg), cfg)
    assert batch.token_ids.shape == (6, 8)


def test_the_gradient_is_that_of_the_trained_tokens(make_policy) -> None:
    """On policy that of -Σ A log p over trained tokens, divided by their number, each after all tokens before it."""
    policy, cfg = make_policy().policy, sections(advantage={"scale_rewards": "none"})
    groups = with_advantages(made(policy, noise=0.0), cfg)
    found = updater(policy, cfg).gradient(make_batches(groups, cfg))

    def loss(parameters: dict) -> mx.array:
        policy.model.update(parameters)
        total = mx.array(0.0)
        for task, rollout in rows(groups):
            ids, prompt = rollout.trajectory.token_ids, task.prompt_ids
            logits = policy.model(mx.array([[*prompt, *ids]]))[0, len(prompt) - 1 : -1].astype(mx.float32)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            for t, (token, trained) in enumerate(zip(ids, rollout.trajectory.trained, strict=True)):
                total = total - rollout.advantage * logprobs[t, token] if trained else total
        return total / TOTALS.tokens

    parameters = policy.model.trainable_parameters()
    _, expected = mx.value_and_grad(loss)(parameters)
    policy.model.update(parameters)
    assert difference(found.arrays, dict(tree_flatten(expected))) < 1e-5
    assert found.metrics["tokens"] == TOTALS.tokens


@pytest.mark.quick_cases("grpo", "gspo", "gspo_token", "cispo", "sapo", "vespo", "gmpo", "dppo", "reinforce++")
@pytest.mark.parametrize("kind", PRESETS)
def test_what_untrained_tokens_hold_changes_nothing(make_policy, kind: str) -> None:
    """No bit of the gradient, and no metric, of two passes under a penalty, whatever the columns hold there."""
    policy = make_policy().policy
    cfg = sections(loss={"type": kind, "beta": 0.1})

    def measured(filler: float):
        groups = everywhere(with_advantages(made(policy, filler), cfg), SAMPLER, filler)
        minibatches = [with_reference(b, policy, cfg) for b in make_minibatches(groups, cfg)]
        other = [
            [replace(b, anchor=b.behaviour, reference=mx.where(b.trained > 0, b.reference, filler)) for b in batches]
            for batches in minibatches
        ]
        return [updater(policy, cfg).gradient(batches) for batches in other]

    clean = measured(0.0)
    assert sum(gradient.metrics["tokens"] for gradient in clean) == TOTALS.tokens
    for filler in GARBAGE:
        for found, expected in zip(measured(filler), clean, strict=True):
            assert (found.loss, found.metrics) == (expected.loss, expected.metrics)
            assert all(mx.array_equal(array, expected.arrays[path]) for path, array in found.arrays.items())


@pytest.mark.parametrize("tokens", [20, 999])
def test_rows_with_and_without_filters_are_corrected_alike_however_they_are_packed(make_policy, tokens: int) -> None:
    """Without filters the distribution that was drawn from is the policy's: `sampler` is `behaviour` there."""
    policy = make_policy().policy
    cfg = sections(
        loss={"type": "dapo", "importance_sampling_correction": "token_truncate"}, optim={"micro_batch_tokens": tokens}
    )
    plain, other = with_advantages(made(policy, noise=0.5), cfg)
    filtered = [
        replace(
            r,
            trajectory=replace(
                r.trajectory, columns={**r.trajectory.columns, SAMPLER: (-0.1,) * len(r.trajectory.token_ids)}
            ),
        )
        for r in other.rollouts
    ]
    groups = [plain, replace(other, rollouts=tuple(filtered))]
    told = everywhere([plain], SAMPLER, 0.0)
    found, expected = (
        updater(policy, cfg).gradient([batch for batches in make_minibatches(mixed, cfg) for batch in batches])
        for mixed in (groups, [*told, groups[1]])
    )
    assert found.metrics == expected.metrics
    assert difference(found.arrays, expected.arrays) == 0
    correction = sections(
        loss={"type": "dapo", "importance_sampling_correction": "none"}, optim={"micro_batch_tokens": tokens}
    )
    bare = updater(policy, correction).gradient([b for bs in make_minibatches(groups, correction) for b in bs])
    assert difference(bare.arrays, expected.arrays) > 1e-3


def test_overlong_filtering_takes_out_trained_tokens(make_policy) -> None:
    policy, cfg = make_policy().policy, sections(loss={"type": "dapo", "mask_truncated_completions": True})
    batches = make_batches(with_advantages(cut(made(policy)), cfg), cfg)
    left = TOTALS.tokens - 4 - 2
    assert sum(batch.trained.sum().item() for batch in batches) == left
    for batch in batches:
        np.testing.assert_allclose(batch.weights, np.array(batch.trained) / left, atol=1e-7)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "luspo"])
def test_rows_that_are_left_out_stay_in_the_denominators(make_policy, kind: str) -> None:
    """Those of advantage 0, those that are filtered, and one of which nothing was sampled: 6 were."""
    policy, cfg = make_policy().policy, sections(loss={"type": kind, "mask_truncated_completions": True})
    groups = with_advantages(cut(made(policy)), cfg)
    kept, silent, *_ = groups[1].rollouts[1:]
    nothing = replace(silent, trajectory=replace(silent.trajectory, trained=(False,) * 4))
    batches = make_batches([groups[0], replace(groups[1], rollouts=(groups[1].rollouts[0], kept, nothing))], cfg)
    (row,) = [w for b in batches for ids, w in zip(b.token_ids, b.weights, strict=True) if ids[0].item() == 110]
    each = {"grpo": 1 / (6 * 3), "dr_grpo": 1 / (6 * LONGEST), "luspo": 1 / 6}[kind]  # "tstss"
    assert row[:5].tolist() == pytest.approx([0, each, 0, each, each])
    assert sum((batch.trained.sum(axis=1) > 0).sum().item() for batch in batches) == 3
