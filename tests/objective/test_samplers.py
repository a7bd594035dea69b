"""Losses that know the sampler: vespo's weight with a correction, dppo's ratio and its trust region. By hand."""

import math
from dataclasses import replace

import mlx.core as mx
import pytest
from objective.columns import of_columns

from grpo.config import LossConfig
from grpo.objective import policy_loss
from grpo.types import Batch

CURRENT = mx.array([[-1.0, -2.0, -0.5]])


def batch_of(advantage: float, **columns) -> Batch:
    """One completion of three tokens, each of weight 1."""
    return of_columns(mx.ones((1, 3)), mx.ones((1, 3)), [advantage], **columns)


def gradient(cfg: LossConfig, batch: Batch) -> list[float]:
    return mx.grad(lambda logprobs: policy_loss(logprobs, batch, cfg)[0])(CURRENT)[0].tolist()


OLD, SAMPLER = mx.array([[-1.1, -1.9, -0.6]]), mx.array([[-1.3, -1.8, -0.9]])


@pytest.mark.parametrize(
    ("correction", "log_weights"),
    [
        ({}, 0.0),
        ({"importance_sampling_correction": "token_truncate"}, 0.2 - 0.1 + 0.3),
        ({"importance_sampling_correction": "token_truncate", "importance_sampling_cap": 1.25}, 0.1 + math.log(1.25)),
        ({"importance_sampling_correction": "token_mask"}, 0.4),
    ],
)
def test_vespo_takes_the_correction_into_its_weight(correction: dict, log_weights: float) -> None:
    """ln W is the sum of lp - old, here 0.1, and of ln w; the loss itself is multiplied by nothing else."""
    batch = batch_of(1.0, anchor=OLD, behaviour=SAMPLER)
    log_w = 0.1 + log_weights
    phi = math.exp(3 + 2 * log_w - 3 * math.exp(log_w))
    cfg = LossConfig(type="vespo", **correction)
    loss, _ = policy_loss(CURRENT, batch, cfg)
    assert gradient(cfg, batch) == pytest.approx([-phi] * 3, rel=1e-5)
    assert loss.item() == pytest.approx(3.5 * phi, rel=1e-5)


def test_vespos_weight_with_a_correction_is_trls() -> None:
    cfg = LossConfig(type="vespo", importance_sampling_correction="token_truncate")
    got = gradient(cfg, batch_of(1.0, anchor=OLD, behaviour=SAMPLER))
    assert [value / 3 for value in got] == pytest.approx([-0.129] * 3, abs=5e-4)


@pytest.mark.parametrize("k", [0.0, 2.0])
def test_a_token_that_the_mask_drops_takes_its_whole_completion_out_of_vespo(k: float) -> None:
    """Its weight of 0 counts as 1e-8, in whose logarithm nothing is infinite."""
    cfg = LossConfig(
        type="vespo", importance_sampling_correction="token_mask", importance_sampling_cap=1.3, vespo_k_pos=k
    )
    phi = math.exp(3 - 3e-8) * 1e-8**k
    got = gradient(cfg, batch_of(1.0, anchor=OLD, behaviour=SAMPLER))
    assert got == pytest.approx([-phi] * 3, rel=1e-4)


def test_a_cap_below_one_leaves_vespos_padding_alone() -> None:
    """Padding has the weight 1, which such a cap masks as well."""
    cfg = LossConfig(type="vespo", importance_sampling_correction="token_mask", importance_sampling_cap=0.95)
    batch = batch_of(1.0, anchor=OLD, behaviour=OLD + 0.1)
    batch = replace(batch, trained=mx.array([[1.0, 1.0, 0.0]]))
    log_w = 0.1 - 0.1 - 0.2  # ln r and ln w of two tokens
    phi = math.exp(3 + 2 * log_w - 3 * math.exp(log_w))
    assert gradient(cfg, batch) == pytest.approx([-phi, -phi, 0.0], rel=1e-5)


def test_dppos_ratio_is_to_the_sampler() -> None:
    """Not to the policy before its first update; no penalty; a ratio above 20 weighs 20."""
    sampler = mx.array([[-1.1, -1.9, -0.6]])
    batch = batch_of(-2.0, anchor=CURRENT - 0.7, behaviour=sampler)
    ratios = [math.exp(0.1), math.exp(-0.1), math.exp(0.1)]
    cfg = LossConfig(type="dppo")
    assert gradient(cfg, batch) == pytest.approx([2 * r for r in ratios], rel=1e-5)
    loss, _ = policy_loss(CURRENT, batch, cfg)
    assert loss.item() == pytest.approx(2 * sum(r * lp for r, lp in zip(ratios, CURRENT[0].tolist(), strict=True)))
    far = batch_of(-1.0, behaviour=CURRENT - 5.0)
    assert gradient(cfg, far) == pytest.approx([20.0] * 3)


def test_dppos_ratio_is_to_what_filters_left_and_to_the_policy_where_the_sampler_says_nothing() -> None:
    sampler = mx.array([[-0.9, math.nan, -0.4]])
    batch = batch_of(-1.0, anchor=CURRENT + 0.3, behaviour=CURRENT + 9.0, sampler=sampler)
    assert gradient(LossConfig(type="dppo"), batch) == pytest.approx(
        [math.exp(x) for x in (-0.1, -0.3, -0.1)], rel=1e-5
    )


@pytest.mark.parametrize(("advantage", "kept"), [(1.0, [1, 1, 0]), (-1.0, [0, 1, 1])])
def test_dppos_trust_region_is_in_probabilities(advantage: float, kept: list[int]) -> None:
    """Probabilities 0.368, 0.135, 0.607 were 0.568, 0.05, 0.407: the last has gone up, the first down, too far."""
    sampled = [0.568, 0.05, 0.407]
    batch = batch_of(advantage, behaviour=mx.log(mx.array([sampled])))
    expected = [
        -advantage * math.exp(lp) / q * keep for lp, q, keep in zip(CURRENT[0].tolist(), sampled, kept, strict=True)
    ]
    cfg = LossConfig(type="dppo")
    assert gradient(cfg, batch) == pytest.approx(expected, rel=1e-5)
    metrics = policy_loss(CURRENT, batch, cfg)[1]
    assert metrics["clip_ratio/region_mean"].item() == pytest.approx(1 / 3)
    assert (LossConfig(type="dppo").preset.epsilon, LossConfig(type="dppo").preset.epsilon_high) == (0.15, 0.15)


def test_dppos_penalty_is_none_unless_asked_for_and_then_on_every_token() -> None:
    batch = batch_of(1.0, behaviour=mx.log(mx.array([[0.568, 0.05, 0.407]])))
    plain = gradient(LossConfig(type="dppo"), batch)
    penalised = gradient(LossConfig(type="dppo", dppo_penalty=0.5), batch)
    log_ratios = (CURRENT - batch.behaviour)[0].tolist()
    assert plain[2] == 0  # outside the trust region, and penalised all the same
    assert [b - a for a, b in zip(plain, penalised, strict=True)] == pytest.approx(log_ratios, rel=1e-4)


def test_dppo_measures_the_sampler_against_the_policy_before_its_first_update() -> None:
    batch = batch_of(1.0, anchor=CURRENT - 0.25, behaviour=CURRENT - 0.75)
    metrics = policy_loss(CURRENT, batch, LossConfig(type="dppo"))[1]
    assert metrics["sampling/sampling_logp_difference/mean"].item() == pytest.approx(0.5)
    assert metrics["sampling/importance_sampling_ratio/max"].item() == pytest.approx(math.exp(0.5), rel=1e-5)


def test_dppo_needs_the_samplers_logprobs() -> None:
    with pytest.raises(ValueError, match="dppo needs the column `behaviour`"):
        policy_loss(CURRENT, batch_of(1.0), LossConfig(type="dppo"))


@pytest.mark.parametrize(("advantage", "beyond"), [(1.0, 1 / 3), (-1.0, 1 / 3), (0.0, 0.0)])
def test_cispos_ceiling_counts_whichever_way_a_token_is_pushed(advantage: float, beyond: float) -> None:
    batch = batch_of(advantage, anchor=CURRENT - mx.array([[2.0, 1.0, 0.0]]))  # ratios 7.4, 2.7, 1
    metrics = policy_loss(CURRENT, batch, LossConfig(type="cispo"))[1]
    assert metrics["clip_ratio/high_mean"].item() == pytest.approx(beyond)
    assert metrics["clip_ratio/low_mean"].item() == 0
