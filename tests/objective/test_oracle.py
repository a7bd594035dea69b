"""The implementation against the oracle, over the product of the settings: loss and gradient to 1e-6."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from objective.columns import of_columns

from grpo.config import AdvantageConfig, LossConfig
from grpo.objective import advantages, policy_loss, token_weights, weights_of_chosen
from grpo.objective.masks import top_entropy_mask
from grpo.presets import PRESETS
from grpo.types import Totals

from oracle import (  # isort: skip
    PAPER,
    advantages as expected_advantages,
    highest_entropy,
    loss_and_gradient,
    weights,
)

LONGEST = 8
LENGTHS = [3, 6, 1, 0, 5, 4]


def batch_of(spread: float, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Current logprobs and a batch whose log-ratios spread by `spread`; padding holds rubbish."""
    draw = np.random.default_rng(seed)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = (np.arange(shape[1])[None] < np.array(LENGTHS)[:, None]).astype(float)
    if seed % 2:  # tokens of an environment, in the middle of a completion
        mask[1, 2:4] = mask[4, 0] = 0
    lp = -draw.uniform(0.2, 3.0, shape)
    near = lambda sd: lp + draw.normal(0, sd, shape)  # noqa: E731
    batch = {
        "mask": mask,
        "advantages": np.array([0.7, -1.3, 0.4, 1.0, -0.2, 0.0]),
        "anchor": near(spread),
        "reference": near(0.3),
        "behaviour": near(0.5),
    }
    batch["behaviour"][1, 2] = np.nan
    for name in ("anchor", "reference", "behaviour"):
        batch[name] = np.where(mask > 0, batch[name], -1e4)
    return np.where(mask > 0, lp, -1e4), batch


def whole_weights(mask: np.ndarray, cfg: LossConfig) -> mx.array:
    """The weights of a step whose rows are these."""
    totals = Totals(len(mask), int(mask.sum()))
    return token_weights(mx.array(mask.astype(np.float32)), totals, cfg, LONGEST)


def measured(lp: np.ndarray, batch: dict, cfg: LossConfig) -> tuple[float, np.ndarray]:
    columns = {name: mx.array(value.astype(np.float32)) for name, value in batch.items()}
    arrays = of_columns(columns.pop("mask"), **columns)
    current = mx.array(lp.astype(np.float32))
    value, gradient = mx.value_and_grad(lambda x: policy_loss(x, arrays, cfg)[0])(current)
    return value.item(), np.array(gradient)


def measured_in_parts(lp: np.ndarray, batch: dict, cfg: LossConfig, size: int) -> tuple[float, np.ndarray]:
    """The loss as a sum over micro-batches of `size` rows, and its gradient."""
    parts = [
        measured(lp[start : start + size], {key: value[start : start + size] for key, value in batch.items()}, cfg)
        for start in range(0, len(lp), size)
    ]
    return sum(loss for loss, _ in parts), np.concatenate([gradient for _, gradient in parts])


CORRECTIONS = [
    {},
    {"importance_sampling_correction": "token_truncate", "importance_sampling_cap": 1.3},
    {"importance_sampling_correction": "token_mask", "importance_sampling_cap": 1.3, "importance_sampling_floor": 0.6},
    {"importance_sampling_correction": "sequence_truncate", "importance_sampling_cap": 1.5},
    {"importance_sampling_correction": "sequence_mask", "importance_sampling_floor": 0.5},
    {"off_policy_mask_threshold": 0.05},
]
PENALTIES = [
    {},
    {"beta": 0.1},
    {"beta": 0.1, "kl_estimator": "k1"},
    {"beta": 0.1, "kl_estimator": "k2"},
    {"beta": 0.1, "kl_importance": True},
    {"beta": 0.1, "kl_estimator": "k2", "kl_importance": True},
]
NOT_FOR = {"dppo": "importance_sampling_correction", "vespo": "sequence"}
"""Corrections that a surrogate refuses, by what is in them."""
BOUNDS = {
    "clip": [
        bounds | cap | level
        for bounds in ({}, {"epsilon": 0.1}, {"epsilon": 0.1, "epsilon_high": 0.31})
        for cap in ({}, {"delta": 1.4})
        for level in ({}, {"ratio": "sequence"}, {"ratio": "token"})
    ],
    "gmpo": [{}, {"epsilon": 0.1, "epsilon_high": 0.21}],
    "dppo": [{}, {"epsilon": 0.05, "epsilon_high": 0.07}, {"dppo_penalty": 0.2}],
    "cispo": [{}, {"epsilon_max": 1.1}, {"epsilon_max": 1.1, "ratio": "sequence"}],
    "sapo": [{}, {"sapo_temperature_pos": 2.0}],
    "vespo": [{}, {"vespo_k_pos": 1.0, "vespo_lambda_neg": 1.5}],
}
SPREADS = [0.0, 0.05, 0.4, 1.0]


def in_turn(surrogate: str, whole: bool) -> Iterator[tuple[float, dict, dict, dict]]:
    """Spreads of the ratio × bounds and levels × penalties × corrections.

    Unless `whole`, each of the others' combinations has one spread: by turns, so that every setting meets every spread.
    """
    refused = NOT_FOR.get(surrogate, "nothing")
    corrections = [one for one in CORRECTIONS if refused not in str(one)]
    kinds = (BOUNDS.get(surrogate, [{}]), PENALTIES, corrections)
    for places in product(*(range(len(kind)) for kind in kinds)):
        bound, penalty, correction = (kind[place] for kind, place in zip(kinds, places, strict=True))
        for spread in SPREADS if whole else [SPREADS[sum(places) % len(SPREADS)]]:
            yield spread, bound, penalty, correction


@pytest.mark.quick_cases("grpo", "gspo", "gspo_token", "cispo", "sapo", "vespo", "gmpo", "dppo", "reinforce++")
@pytest.mark.parametrize("name", PRESETS)
def test_loss_and_gradient(name: str) -> None:
    """Masks and splits by turns; the whole product is the slow test's, where it is large."""
    surrogate = PRESETS[name].surrogate
    assert compared(name, in_turn(surrogate, whole=surrogate != "clip")) >= 120


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].surrogate == "clip"])
def test_loss_and_gradient_at_every_spread(name: str) -> None:
    assert compared(name, in_turn("clip", whole=True)) >= 2592


def compared(name: str, cases: Iterator[tuple[float, dict, dict, dict]]) -> int:
    """Hold each case's loss and gradient against the oracle's. Returns how many there were."""
    surrogate, checked = PRESETS[name].surrogate, 0
    for index, (spread, bound, penalty, correction) in enumerate(cases):
        seed = index + index // 6  # every correction meets every mask and split
        settings = {**bound, **penalty, **correction}
        cfg = LossConfig(type=name, **settings)
        lp, batch = batch_of(spread, seed)
        batch["weights"] = weights(batch["mask"], PAPER[name][2], LONGEST)
        if spread == 0:
            del batch["anchor"]
        if surrogate == "dppo" and seed % 3 == 0:  # sampled through filters
            batch["sampler"] = batch["behaviour"] + 0.2
        if not correction and surrogate != "dppo":
            del batch["behaviour"]
        expected, gradient = loss_and_gradient(name, lp, batch, settings)
        got, got_gradient = measured_in_parts(lp, batch, cfg, size=(6, 1, 2)[seed % 3])
        assert got == pytest.approx(expected, abs=1e-6, rel=2e-6), (name, spread, settings)
        np.testing.assert_allclose(got_gradient, gradient, atol=1e-6, rtol=2e-6, err_msg=str((name, spread, settings)))
        checked += 1
    return checked


@pytest.mark.parametrize("name", PRESETS)
def test_weights(name: str) -> None:
    _, batch = batch_of(0.1, 0)
    got = whole_weights(batch["mask"], LossConfig(type=name))
    np.testing.assert_allclose(np.array(got), weights(batch["mask"], PAPER[name][2], LONGEST), atol=1e-7)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("fraction", [0.2, 0.6])
def test_weights_of_the_tokens_of_highest_entropy(name: str, fraction: float) -> None:
    """N stays the number of all completions; what denominators count in tokens is counted in chosen ones."""
    cfg = LossConfig(type=name)
    for seed in range(4):
        _, batch = batch_of(0.1, seed)
        mask, entropies = batch["mask"], np.random.default_rng(seed).permutation(36).reshape(6, 6).astype(float)
        chosen = highest_entropy(entropies, mask, fraction)
        assert chosen.sum() == math.ceil(fraction * mask.sum())
        whole = whole_weights(mask, cfg)
        found = top_entropy_mask(mx.array(entropies), mx.array(mask.astype(np.float32)), fraction)
        expected = weights(chosen, PAPER[name][2], LONGEST)
        if PRESETS[name].normalize == "micro_batch":
            parts = [(whole, found)]
        else:  # rows without tokens are in no batch, and the rest is split anyhow
            parts = [(whole[start:stop], found[start:stop]) for start, stop in ((0, 1), (1, 3), (4, 6))]
            expected = np.delete(expected, 3, axis=0)
        moved = weights_of_chosen([part for part, _ in parts], [part for _, part in parts], cfg)
        np.testing.assert_allclose(np.concatenate([np.array(part) for part in moved]), expected, atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("split", [1, 2, 4])
def test_micro_batches_add_up(name: str, split: int) -> None:
    """The parts' losses and gradients are the whole's, with weights that were fixed before."""
    cfg = LossConfig(type=name, beta=0.1)
    lp, batch = batch_of(0.4, 7)
    batch["weights"] = np.array(whole_weights(batch["mask"], cfg))
    whole, gradient = measured(lp, batch, cfg)
    total, rows = measured_in_parts(lp, batch, cfg, split)
    assert total == pytest.approx(whole, abs=1e-6)
    np.testing.assert_allclose(rows, gradient, atol=1e-7)


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch", "gdpo", "maxrl"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(baseline: str, scale: str) -> None:
    for seed in range(20):
        draw = np.random.default_rng(seed)
        rewards = draw.choice([0.0, 1.0, 0.5, np.nan, -2.0], (12, 3))
        rewards[:4] = [1.0, np.nan, 0.5]  # a uniform group
        rewards[5] = np.nan  # a completion that nothing scored
        reward_weights = np.array([1.0, 0.5, 0.0 if seed % 2 else -0.3])
        cfg = AdvantageConfig(baseline=baseline, scale_rewards=scale)
        found = advantages(mx.array(rewards.astype(np.float32)), mx.array(reward_weights.astype(np.float32)), 4, cfg)
        expected = expected_advantages(rewards, reward_weights, 4, baseline, scale)
        np.testing.assert_allclose(np.array(found), expected, atol=2e-4 if baseline == "maxrl" else 2e-5, rtol=1e-4)
        assert found[5].item() == 0
        if baseline not in ("batch", "gdpo"):
            assert found[:4].tolist() == [0.0] * 4


def test_the_oracle_knows_every_preset_and_no_other() -> None:
    assert set(PAPER) == set(PRESETS)


def test_nan_logprobs_of_the_sampler_count_as_equal() -> None:
    cfg = LossConfig(importance_sampling_correction="token_truncate")
    mask = mx.ones((1, 2))
    batch = of_columns(mask, mask / 2, [1.0], behaviour=mx.array([[math.nan, -1.0]]))
    loss, metrics = policy_loss(mx.array([[-1.0, -1.0]]), batch, cfg)
    assert loss.item() == -1.0
    assert metrics["sampling/sampling_logp_difference/max"].item() == 0
