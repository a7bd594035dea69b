"""Untrained tokens in the middle of a row: as if they were not there, whatever their columns hold.

Against the oracle, and against the same rows with the untrained tokens taken out.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import mlx.core as mx
import numpy as np
import pytest
from objective.columns import of_columns

from grpo.config import LossConfig
from grpo.objective import policy_loss, token_weights, weights_of_chosen
from grpo.objective.corrections import sampling_log_ratios
from grpo.objective.masks import top_entropy_mask
from grpo.presets import PRESETS
from grpo.types import Batch, Totals

from oracle import PAPER, highest_entropy, loss_and_gradient, weights  # isort: skip

TRAINED = np.array(
    [
        [1, 1, 0, 0, 1, 1],  # a hole in the middle
        [0, 1, 0, 1, 0, 0],  # at the front, in the middle, and padding behind
        [1, 0, 1, 1, 0, 1],
        [0, 0, 0, 0, 0, 0],  # nothing of it was sampled
        [1, 1, 1, 0, 0, 0],  # none
    ]
)
ADVANTAGES = np.array([0.7, -1.3, 0.4, 1.0, -0.2])
LONGEST = 8
LOGPROBS = ("anchor", "reference", "behaviour", "sampler")
GARBAGE = [math.nan, 1e9, -1e9, math.inf]


def columns(seed: int = 0) -> dict[str, np.ndarray]:
    """Logprobs by name, `current` among them, far enough apart that bounds bind on some tokens."""
    draw = np.random.default_rng(seed)
    current = -draw.uniform(0.2, 3.0, TRAINED.shape)
    spread = {"anchor": 0.5, "reference": 0.3, "behaviour": 0.5, "sampler": 0.6}
    near = {name: current + draw.normal(0, sd, TRAINED.shape) for name, sd in spread.items()}
    return {"current": current, "entropies": draw.uniform(0, 2, TRAINED.shape), **near}


def array(values: np.ndarray) -> mx.array:
    return mx.array(np.asarray(values, dtype=np.float32))


def weights_of(mask: np.ndarray, cfg: LossConfig) -> mx.array:
    return token_weights(array(mask), Totals(len(mask), int(mask.sum())), cfg, LONGEST)


def given(cfg: LossConfig, named: dict[str, np.ndarray]) -> tuple[mx.array, Batch, mx.array]:
    """What `policy_loss` takes: current logprobs, the batch, entropies."""
    logprobs = {name: array(named[name]) for name in LOGPROBS}
    batch = of_columns(array(TRAINED), weights_of(TRAINED, cfg), array(ADVANTAGES), **logprobs)
    return array(named["current"]), batch, array(named["entropies"])


def measured(current: mx.array, batch: Batch, entropies: mx.array, cfg: LossConfig):
    """The loss, its gradients with respect to logprobs and entropies, and the metrics."""

    def loss(current: mx.array, entropies: mx.array):
        return policy_loss(current, batch, cfg, entropies)

    (value, metrics), gradients = mx.value_and_grad(loss, argnums=(0, 1))(current, entropies)
    return value.item(), [np.array(g) for g in gradients], {name: metric.item() for name, metric in metrics.items()}


def settings_of(name: str) -> list[dict]:
    """Settings that read every column there is."""
    surrogate = PRESETS[name].surrogate
    correction = {"importance_sampling_correction": "token_truncate", "importance_sampling_cap": 1.3}
    sequence = {"importance_sampling_correction": "sequence_mask", "importance_sampling_floor": 0.5}
    made: list[dict] = [{"beta": 0.1}, {"beta": 0.1, "off_policy_mask_threshold": 0.05, "entropy_coef": 0.3}]
    made += [] if surrogate == "dppo" else [{**correction, "beta": 0.2, "kl_estimator": "k2", "kl_importance": True}]
    made += [] if surrogate in ("dppo", "vespo") else [sequence]
    made += [{"delta": 1.4, "beta": 0.1}] if surrogate == "clip" else []
    return made


@pytest.mark.parametrize("name", PRESETS)
def test_every_loss_is_the_oracles(name: str) -> None:
    for seed, settings in enumerate(settings_of(name)):
        cfg, named = LossConfig(type=name, **settings), columns(seed)
        current, batch, entropies = given(cfg, named)
        value, (gradient, of_entropies), metrics = measured(current, batch, entropies, cfg)
        w = weights(TRAINED.astype(float), PAPER[name][2], LONGEST)
        row = {"mask": TRAINED, "weights": w, "advantages": ADVANTAGES, **{k: named[k] for k in LOGPROBS}}
        expected, expected_gradient = loss_and_gradient(name, named["current"], row, settings)
        bonus = settings.get("entropy_coef", 0.0)
        assert value == pytest.approx(expected - bonus * (w * named["entropies"]).sum(), abs=2e-6), settings
        np.testing.assert_allclose(gradient, expected_gradient, atol=2e-6, err_msg=str(settings))
        np.testing.assert_allclose(of_entropies, -bonus * w, atol=1e-6)
        assert metrics["tokens"] == TRAINED.sum() == 13


@pytest.mark.each_value
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_untrained_tokens_hold_changes_nothing(name: str, garbage: float) -> None:
    """Neither the loss, nor a bit of the gradient, nor any metric."""
    for settings in settings_of(name):
        cfg = LossConfig(type=name, **settings)
        current, batch, entropies = given(cfg, columns())
        dirty = {
            column: mx.where(batch.trained > 0, getattr(batch, column), garbage)
            for column in (*LOGPROBS, "weights", "advantages")
        }
        clean, found = (measured(current, b, entropies, cfg) for b in (batch, replace(batch, **dirty)))
        assert (found[0], found[2]) == (clean[0], clean[2]), settings
        assert all(np.array_equal(a, b) for a, b in zip(found[1], clean[1], strict=True)), settings
        of_policy = (mx.where(batch.trained > 0, column, garbage) for column in (current, entropies))
        other = measured(next(of_policy), batch, next(of_policy), cfg)
        assert (other[0], other[2]) == (clean[0], clean[2]), settings


def closed(values: mx.array) -> mx.array:
    """`[B, T]` with each row's trained values moved to its front, as if the others had never been there."""
    rows = [
        [*np.array(row)[mask > 0], *[0.0] * int((mask == 0).sum())] for row, mask in zip(values, TRAINED, strict=True)
    ]
    return array(np.array(rows))


@pytest.mark.parametrize("name", PRESETS)
def test_rows_with_holes_are_the_rows_without_them(name: str) -> None:
    """Loss, gradient, and every metric: clip fractions, ratios of sequences, the sampler's, KL and entropy."""
    for settings in settings_of(name):
        cfg = LossConfig(type=name, **settings)
        current, batch, entropies = given(cfg, columns(3))
        per_token = ("trained", "weights", "advantages", *LOGPROBS)
        whole = replace(batch, **{column: closed(getattr(batch, column)) for column in per_token})
        np.testing.assert_allclose(whole.weights, weights_of(np.array(whole.trained), cfg), atol=1e-7)
        value, gradients, metrics = measured(current, batch, entropies, cfg)
        expected, without, told = measured(closed(current), whole, closed(entropies), cfg)
        assert value == pytest.approx(expected, abs=1e-6)
        for gradient, other in zip(gradients, without, strict=True):
            np.testing.assert_allclose(closed(array(gradient)), other, atol=1e-6)
            assert not gradient[TRAINED == 0].any()
        assert metrics == pytest.approx(told, rel=1e-5, abs=1e-6), settings


@pytest.mark.parametrize("name", PRESETS)
def test_weights(name: str) -> None:
    """The normalizers count trained tokens, and all rows: one that holds none was sampled, too."""
    expected = weights(TRAINED.astype(float), PAPER[name][2], LONGEST)
    np.testing.assert_allclose(weights_of(TRAINED, LossConfig(type=name)), expected, atol=1e-7)


@pytest.mark.parametrize("name", PRESETS)
def test_the_totals_are_given_and_not_counted(name: str) -> None:
    """Some rows of an update have the weights that they have among all of them."""
    cfg = LossConfig(type=name)
    if cfg.preset.normalize == "micro_batch":
        return
    totals = Totals(len(TRAINED), int(TRAINED.sum()))
    some = token_weights(array(TRAINED[1:3]), totals, cfg, LONGEST)
    assert mx.array_equal(some, weights_of(TRAINED, cfg)[1:3])


@pytest.mark.parametrize("garbage", [0.0, *GARBAGE])
def test_the_quantile_of_entropy_is_of_trained_tokens(garbage: float) -> None:
    entropies = columns()["entropies"]
    expected = highest_entropy(entropies, TRAINED, 0.3)
    assert expected.sum() == 4  # of 13
    dirty = np.where(TRAINED > 0, entropies, garbage)
    chosen = top_entropy_mask(array(dirty), array(TRAINED), 0.3)
    np.testing.assert_array_equal(chosen, expected)
    cfg = LossConfig(type="dapo")
    (moved,) = weights_of_chosen([weights_of(TRAINED, cfg)], [chosen], cfg)
    np.testing.assert_allclose(moved, expected / 4, atol=1e-6)


def test_clip_fractions_by_hand() -> None:
    """Ratios e^.5, e^-.5 and 1 on trained tokens; e^9 in the hole, which nothing counts."""
    trained = mx.array([[1.0, 0.0, 1.0, 1.0]])
    anchor = mx.full((1, 4), -2.0)
    current = anchor + mx.array([[0.5, 9.0, -0.5, 0.0]])
    cfg = LossConfig(type="dapo")
    batch = of_columns(trained, trained / 3, [1.0], anchor=anchor)
    metrics = policy_loss(current, batch, cfg)[1]
    assert metrics["clip_ratio/high_mean"].item() == pytest.approx(1 / 3)
    assert metrics["clip_ratio/high_max"].item() == pytest.approx(1 / 3)
    assert metrics["clip_ratio/low_mean"].item() == 0


@pytest.mark.parametrize(("shift", "end"), [(0.5, "min"), (-0.5, "max")])
def test_no_metric_of_the_sampler_sees_an_untrained_token(shift: float, end: str) -> None:
    """Every trained token's ratio is on one side of 1, which an untrained token's must not stand in for."""
    trained, anchor = mx.array([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), mx.full((2, 3), -2.0)
    batch = of_columns(trained, trained / 2, [1.0, 1.0], anchor=anchor, behaviour=anchor - shift)
    metrics = policy_loss(anchor, batch, LossConfig())[1]
    assert metrics[f"sampling/importance_sampling_ratio/{end}"].item() == pytest.approx(math.exp(shift))
    assert metrics[f"sampling/sequence_importance_sampling_ratio/{end}"].item() == pytest.approx(math.exp(2 * shift))
    assert metrics["sampling/importance_sampling_ratio/mean"].item() == pytest.approx(math.exp(shift))
    assert metrics["sampling/sampling_logp_difference/mean"].item() == pytest.approx(0.5)
    token, sequence = sampling_log_ratios(anchor, anchor - shift, trained)  # by themselves they know the mask, too
    assert token[0].tolist() == [shift, 0, shift]
    assert sequence[:, 0].tolist() == [2 * shift, 0]


def test_a_sequences_ratio_by_hand() -> None:
    """gspo: s = exp((.4 - .1) / 2), the mean over the two trained tokens of three."""
    trained, anchor = mx.array([[1.0, 0.0, 1.0]]), mx.full((1, 3), -2.0)
    current = anchor + mx.array([[0.4, 5.0, -0.1]])
    cfg = LossConfig(type="gspo", epsilon=0.5, epsilon_high=0.5)
    loss, _ = policy_loss(current, of_columns(trained, trained / 2, [1.0], anchor=anchor), cfg)
    assert loss.item() == pytest.approx(-math.exp(0.15), rel=1e-6)


def test_a_researchers_loss_sees_zeros_where_nothing_is_trained() -> None:
    """And a batch: typed, with every column `[B, T]`, the anchor always among them."""
    seen: list[Batch] = []

    def loss(current: mx.array, batch: Batch, cfg: LossConfig) -> mx.array:
        seen.append(batch)
        return current

    named = {name: np.where(TRAINED > 0, column, np.nan) for name, column in columns().items()}
    current, batch, _ = given(LossConfig(), named)
    stale = array(np.where(TRAINED > 0, 0.0, np.nan))
    policy_loss(current, replace(batch, anchor=None, stale=stale, teacher=batch.reference), LossConfig(), custom=loss)
    (batch,) = seen
    assert isinstance(batch, Batch)
    for field in fields(batch):
        if field.name not in (
            "prompt_ids",
            "prompt_lengths",
            "prompt_index",
            "token_ids",
            "beta",
            "entropies",
            "lines",
            "starts",
            "teacher_coef",
            "teacher_hidden",
            "teacher_ids",
            "teacher_logprobs",
        ):
            column = np.array(getattr(batch, field.name))
            assert column.shape == TRAINED.shape
            assert not column[TRAINED == 0].any(), field.name
    np.testing.assert_array_equal(np.array(batch.anchor)[TRAINED > 0], np.array(current)[TRAINED > 0])
