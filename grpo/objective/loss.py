"""The policy loss: ratio × surrogate × normalizer, plus the KL penalty and the entropy bonus."""

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
from grpo.objective.measures import Metrics, clip_metrics, counts, mean, sampler_metrics
from grpo.objective.ratios import bounded_exp, log_ratios
from grpo.objective.surrogates import SURROGATES, Terms
from grpo.objective.teaching import sampled_kl
from grpo.types import Batch

CustomLoss = Callable[[mx.array, Batch, LossConfig], mx.array]
"""The function named by `loss.use`: `(current, batch, cfg) -> per_token_loss`, `[B, T]`. See `policy_loss`."""


def policy_loss(
    current: mx.array,
    batch: Batch,
    cfg: LossConfig,
    entropies: mx.array | None = None,
    custom: CustomLoss | None = None,
    divergence: mx.array | None = None,
) -> tuple[mx.array, Metrics]:
    """The loss of a micro-batch, to be minimized, and its metrics.

        loss = Σ weights · (keep · w · surrogate(ratio, A) + β · KL - c · entropy + d · KL to the teacher)

    over trained tokens. keep is the off-policy mask and w the correction for the sampler (vespo puts w into its own
    weight instead). grpo/presets.py has the formulas.

    current `[B, T]` float32 is log p under the current policy, differentiable. entropies `[B, T]` float32 are in nats,
    or None. divergence `[B, T]` float32 is the KL to a teacher in nats, differentiable; it is required if the batch has
    the weight d (`teacher_coef`). The batch must have `trained`, `weights` and `advantages`. Its other columns:

        anchor     denominator of the ratios, except dppo's. None: the current policy is the anchor, every ratio is 1.
        stale      where it is 1, `behaviour` is the anchor for ratios, bounds and corrections, so the ratio of a stale
                   token may differ from 1 even without the column `anchor`
        behaviour  read by the correction, the off-policy mask, dppo and the `sampling/` metrics
        sampler    replaces `behaviour` in the correction and in dppo if filters changed the distribution that tokens
                   were drawn from. The off-policy mask compares two policies, so it always reads `behaviour`.
        reference  required if β is above 0
        teacher    read only by the metric `teacher/kl`: `advantages` already includes the teacher's part
        beta       replaces `cfg.beta` as β
        entropies  replaces the argument `entropies` in the metric `entropy`: with dropout, the values without dropout

    `custom` replaces the surrogate. In the batch that it receives, `anchor` is always set and every column is 0 at
    untrained tokens.

    Metrics are scalars over the batch's trained tokens; `combine_metrics` merges the metrics of several batches.
    Columns may hold any value at untrained tokens, even NaN: they are masked before any exponential.

    Raises ValueError if the settings need a column that the batch lacks.
    """
    current = mx.where(batch.trained > 0, current, 0.0)
    batch = _on_trained(batch, current)
    correction = _correction(batch, cfg)
    surrogate = None if custom else cfg.preset.surrogate
    terms = _terms(current, batch, cfg, sampled_from(batch) if surrogate == "dppo" else _anchor(batch), correction)
    metrics = {**counts(batch), **sampler_metrics(batch), **clip_metrics(terms, cfg, surrogate)}
    per_token = custom(current, batch, cfg) if custom else SURROGATES[cfg.preset.surrogate](terms, cfg)
    if correction is not None and surrogate != "vespo":
        per_token = per_token * correction
    for add in (_off_policy_mask, _penalty, _entropy_bonus):
        per_token, measured = add(per_token, terms, batch, cfg, entropies)
        metrics |= measured
    per_token, measured = _teaching(per_token, batch, divergence)
    metrics |= measured
    loss = mx.where(batch.trained > 0, batch.weights * per_token, 0.0).sum()
    return loss, {name: mx.stop_gradient(value) for name, value in metrics.items()}


def _on_trained(batch: Batch, current: mx.array) -> Batch:
    """The batch with 0 at untrained tokens in every column, and with an anchor (see `_anchored`)."""
    trained = batch.trained.astype(mx.float32)

    def masked(column: mx.array | None) -> mx.array | None:
        return None if column is None else mx.where(trained > 0, column, 0.0)

    anchor = _anchored(batch, current)
    return replace(
        batch,
        trained=trained,
        weights=mx.where(trained > 0, batch.weights, 0.0),
        advantages=mx.where(trained > 0, batch.advantages, 0.0),
        behaviour=masked(batch.behaviour),
        sampler=masked(batch.sampler),
        stale=masked(batch.stale),
        anchor=mx.stop_gradient(current) if anchor is None else masked(anchor),
        reference=masked(batch.reference),
        teacher=masked(batch.teacher),
        entropies=masked(batch.entropies),
    )


def _anchored(batch: Batch, current: mx.array) -> mx.array | None:
    """The denominator of ratios: the batch's anchor, but `behaviour` for stale tokens. None: the current policy."""
    if batch.stale is None:
        return batch.anchor
    anchor = mx.stop_gradient(current) if batch.anchor is None else batch.anchor
    if batch.behaviour is None:
        raise ValueError("stale tokens need the column `behaviour` in the batch: it is their anchor")
    return mx.where(batch.stale > 0, batch.behaviour, anchor)


def _anchor(batch: Batch) -> mx.array:
    assert batch.anchor is not None, "`_on_trained` has set it"
    return batch.anchor


def _terms(
    current: mx.array, batch: Batch, cfg: LossConfig, denominator: mx.array, correction: mx.array | None
) -> Terms:
    log_ratio = log_ratios(current, denominator, batch.trained, cfg.preset.ratio)
    return Terms(current, denominator, log_ratio, batch.advantages, batch.trained, correction)


def _correction(batch: Batch, cfg: LossConfig) -> mx.array | None:
    """The importance weights anchor / sampler, `[B, T]`. None if the loss has no correction."""
    if cfg.importance_sampling_correction == "none":
        return None
    sampler = drawn_from(batch)
    if sampler is None:
        raise ValueError("importance_sampling_correction needs the column `behaviour` in the batch")
    return importance_weights(*sampling_log_ratios(mx.stop_gradient(_anchor(batch)), sampler, batch.trained), cfg)


def _off_policy_mask(
    per_token: mx.array, terms: Terms, batch: Batch, cfg: LossConfig, entropies: mx.array | None
) -> tuple[mx.array, Metrics]:
    """Set the loss to 0 on completions that the policy has moved away from (see `off_policy_keep`).

    Without `behaviour`, the drift is anchor - current.
    """
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
    """Add β · KL to the loss of each token, if the loss has a KL penalty at this step."""
    del entropies
    if cfg.kl_in != "loss" or not (cfg.beta > 0 or cfg.beta_end):
        return per_token, {}
    if batch.reference is None:
        if cfg.beta_end is not None:  # the schedule has β = 0 at this step
            return per_token, {}
        raise ValueError("beta > 0 needs the column `reference` in the batch")
    kl = kl_estimate(terms.current, batch.reference, cfg.kl_estimator)
    if cfg.kl_importance:
        kl = bounded_exp(terms.current - terms.denominator) * kl
    return per_token + (cfg.beta if batch.beta is None else batch.beta) * kl, {"kl": mean(kl, terms.trained)}


def _entropy_bonus(
    per_token: mx.array, terms: Terms, batch: Batch, cfg: LossConfig, entropies: mx.array | None
) -> tuple[mx.array, Metrics]:
    """Subtract c · entropy from the loss of each token, if c is above 0. The metric needs only `entropies`."""
    if entropies is None:
        if cfg.entropy_coef > 0:
            raise ValueError("entropy_coef > 0 needs the argument `entropies`")
        return per_token, {}
    entropies = mx.where(terms.trained > 0, entropies, 0.0)
    if cfg.entropy_coef > 0:
        per_token = per_token - cfg.entropy_coef * entropies
    return per_token, {"entropy": mean(entropies if batch.entropies is None else batch.entropies, terms.trained)}


def _teaching(per_token: mx.array, batch: Batch, divergence: mx.array | None) -> tuple[mx.array, Metrics]:
    """Add d · KL(policy ‖ teacher) to the loss of each token, if the batch has d. With or without d, measure the KL."""
    if batch.teacher_coef is not None:
        if divergence is None:
            raise ValueError("a batch with `teacher_coef` needs the argument `divergence`")
        divergence = mx.where(batch.trained > 0, divergence, 0.0)
        return per_token + batch.teacher_coef * divergence, {"teacher/kl": mean(divergence, batch.trained)}
    if batch.teacher is None or batch.behaviour is None:
        return per_token, {}
    return per_token, {"teacher/kl": mean(sampled_kl(batch.behaviour, batch.teacher), batch.trained)}
