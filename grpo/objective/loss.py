"""The policy loss: ratio × surrogate × normaliser, with what may be added to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from grpo.config import LossConfig
from grpo.objective.corrections import (
    drawn_from,
    importance_weights,
    off_policy_keep,
    sampled_from,
    sampling_log_ratios,
)
from grpo.objective.kl import kl_estimate
from grpo.objective.measures import Metrics, clip_metrics, mean, sampler_metrics
from grpo.objective.ratios import bounded_exp, log_ratios
from grpo.objective.surrogates import SURROGATES, Terms
from grpo.types import Batch

CustomLoss = Callable[[mx.array, Batch, LossConfig], mx.array]


def policy_loss(
    current: mx.array,
    batch: Batch,
    cfg: LossConfig,
    entropies: mx.array | None = None,
    custom: CustomLoss | None = None,
) -> tuple[mx.array, Metrics]:
    """The loss of a batch, to be minimised, and what it measured.

    current `[B, T]` float32: log p of the policy as it is, differentiable; entropies `[B, T]` or None. Of the batch's
    columns it reads `trained`, `weights` and `advantages`, and where they are there:

        anchor     the policy before this step's first update: what ratios are to (dppo's are not). Without it the
                   anchor is the current policy, and the ratio is exactly 1.
        reference  needed when the penalty's weight is above 0
        behaviour  the policy that sampled: for the correction, the off-policy mask and dppo; measured wherever it is
        sampler    the distribution that was sampled, where filters made it another one: the correction and dppo read it
                   in the place of `behaviour` then. The off-policy mask does not: no policy has it.
        entropies  what the metric `entropy` is of, in the place of the argument: the whole network's, with dropout
        beta       the penalty's weight now, in the place of `cfg.beta`

    `custom`, a function `(current, batch, cfg) -> per_token_loss`, takes the surrogate's place. In its batch every
    column is 0 where nothing is trained, and `anchor` is always there.

    loss = Σ weights · (keep · w · surrogate(ratio, A) + β · KL - c · entropy), where keep and w are the off-policy mask
    and the sampler's correction (which vespo takes into its own weight instead). The formulas are in grpo/presets.py.
    Raises ValueError for a column that the settings need and the batch has not.

    Metrics are over the batch's trained tokens; `combine_metrics` puts those of a step's batches together. Values where
    nothing is trained may be anything: the mask enters before any exponential.
    """
    current = mx.where(batch.trained > 0, current, 0.0)
    batch = _on_trained(batch, current)
    correction = _correction(batch, cfg)
    surrogate = None if custom else cfg.preset.surrogate
    terms = _terms(current, batch, cfg, sampled_from(batch) if surrogate == "dppo" else _anchor(batch), correction)
    metrics = {"tokens": batch.trained.sum(), **sampler_metrics(batch), **clip_metrics(terms, cfg, surrogate)}
    per_token = custom(current, batch, cfg) if custom else SURROGATES[cfg.preset.surrogate](terms, cfg)
    if correction is not None and surrogate != "vespo":
        per_token = per_token * correction
    for add in (_off_policy_mask, _penalty, _entropy_bonus):
        per_token, measured = add(per_token, terms, batch, cfg, entropies)
        metrics |= measured
    loss = mx.where(batch.trained > 0, batch.weights * per_token, 0.0).sum()
    return loss, {name: mx.stop_gradient(value) for name, value in metrics.items()}


def _on_trained(batch: Batch, current: mx.array) -> Batch:
    """The batch with 0 in every column where nothing is trained, and with an anchor: at first the current policy."""
    trained = batch.trained.astype(mx.float32)

    def masked(column: mx.array | None) -> mx.array | None:
        return None if column is None else mx.where(trained > 0, column, 0.0)

    return replace(
        batch,
        trained=trained,
        weights=mx.where(trained > 0, batch.weights, 0.0),
        advantages=mx.where(trained > 0, batch.advantages, 0.0),
        behaviour=masked(batch.behaviour),
        sampler=masked(batch.sampler),
        anchor=mx.stop_gradient(current) if batch.anchor is None else masked(batch.anchor),
        reference=masked(batch.reference),
        entropies=masked(batch.entropies),
    )


def _anchor(batch: Batch) -> mx.array:
    assert batch.anchor is not None, "`_on_trained` has set it"
    return batch.anchor


def _terms(
    current: mx.array, batch: Batch, cfg: LossConfig, denominator: mx.array, correction: mx.array | None
) -> Terms:
    log_ratio = log_ratios(current, denominator, batch.trained, cfg.preset.ratio)
    return Terms(current, denominator, log_ratio, batch.advantages, batch.trained, correction)


def _correction(batch: Batch, cfg: LossConfig) -> mx.array | None:
    """The weight of each token that corrects for the sampler, `[B, T]`: anchor / sampler. None without a correction."""
    if cfg.importance_sampling_correction == "none":
        return None
    sampler = drawn_from(batch)
    if sampler is None:
        raise ValueError("importance_sampling_correction needs the column `behaviour` in the batch")
    return importance_weights(*sampling_log_ratios(mx.stop_gradient(_anchor(batch)), sampler, batch.trained), cfg)


def _off_policy_mask(
    per_token: mx.array, terms: Terms, batch: Batch, cfg: LossConfig, entropies: mx.array | None
) -> tuple[mx.array, Metrics]:
    """Nothing for the completions that the policy has left behind: behaviour (without it, anchor) - current."""
    del entropies
    if cfg.off_policy_mask_threshold is None:
        return per_token, {}
    drift = (_anchor(batch) if batch.behaviour is None else batch.behaviour) - terms.current
    drift = mx.where(mx.isnan(drift), 0.0, drift)
    keep = off_policy_keep(drift, terms.advantages, terms.trained, cfg.off_policy_mask_threshold)
    return per_token * keep, {"off_policy_kept": mean(keep, terms.trained)}


def _penalty(
    per_token: mx.array, terms: Terms, batch: Batch, cfg: LossConfig, entropies: mx.array | None
) -> tuple[mx.array, Metrics]:
    """Plus β · KL of each token, where the loss has a penalty now."""
    del entropies
    if cfg.kl_in != "loss" or not (cfg.beta > 0 or cfg.beta_end):
        return per_token, {}
    if batch.reference is None:
        if cfg.beta_end is not None:  # the schedule is at 0
            return per_token, {}
        raise ValueError("beta > 0 needs the column `reference` in the batch")
    kl = kl_estimate(terms.current, batch.reference, cfg.kl_estimator)
    if cfg.kl_importance:
        kl = bounded_exp(terms.current - terms.denominator) * kl
    return per_token + (cfg.beta if batch.beta is None else batch.beta) * kl, {"kl": mean(kl, terms.trained)}


def _entropy_bonus(
    per_token: mx.array, terms: Terms, batch: Batch, cfg: LossConfig, entropies: mx.array | None
) -> tuple[mx.array, Metrics]:
    """Less c · entropy of each token, where there is a bonus; measured wherever entropies are there."""
    if entropies is None:
        if cfg.entropy_coef > 0:
            raise ValueError("entropy_coef > 0 needs entropies")
        return per_token, {}
    entropies = mx.where(terms.trained > 0, entropies, 0.0)
    if cfg.entropy_coef > 0:
        per_token = per_token - cfg.entropy_coef * entropies
    return per_token, {"entropy": mean(entropies if batch.entropies is None else batch.entropies, terms.trained)}
