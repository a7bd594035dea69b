"""The policy loss: ratio × surrogate × normaliser, with what may be added to it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from grpo.config import LossConfig
from grpo.objective.corrections import (
    effective_sample_size,
    importance_weights,
    off_policy_keep,
    sampling_log_ratios,
)
from grpo.objective.kl import kl_estimate
from grpo.objective.ratios import bounded_exp, log_ratios, mean_over_tokens
from grpo.objective.surrogates import BOUNDED, SURROGATES, Terms

Metrics = dict[str, mx.array]
CustomLoss = Callable[[mx.array, Any, LossConfig], mx.array]

LOGP_DIFFERENCE = "sampling/sampling_logp_difference/mean"
UNFILTERED_LOGP_DIFFERENCE = "sampling/unfiltered_logp_difference/mean"
"""Only where filters or penalties reshape what is sampled: the same of the sampler's logprobs before them."""


def policy_loss(
    logprobs: mx.array,
    batch: Any,
    cfg: LossConfig,
    entropies: mx.array | None = None,
    custom: CustomLoss | None = None,
) -> tuple[mx.array, Metrics]:
    """The loss of a batch, to be minimised, and what it measured.

    logprobs `[B, T]` float32 of the current policy, differentiable; entropies `[B, T]` or None. `batch` has `mask` and
    `weights` `[B, T]` and `advantages` `[B]` or `[B, T]`, and may have, each `[B, T]`:

        old_logprobs       of the policy before its first update on this batch. Without them they are the current
                           ones, and the ratio is exactly 1.
        ref_logprobs       of the reference; needed when the penalty's weight is above 0
        sampling_logprobs  that the sampler gave; for the correction, and measured wherever they are
        sampler_logprobs   of the distribution sampled from, where filters made it another one: the correction's then
        beta               a scalar array, the penalty's weight now, in the place of `cfg.beta`

    `custom`, a function `(logprobs, batch, cfg) -> per_token_loss`, takes the surrogate's place. Its batch has every
    field above as `[B, T]`: old_logprobs always, the other optional ones or None.

    loss = Σ weights · (keep · w · surrogate(ratio, A) + β · KL - c · entropy), where keep and w are the off-policy mask
    and the sampler's correction. The formulas are in grpo/presets.py. Raises ValueError for a field that the settings
    need and the batch has not.

    Metrics are over the batch's masked tokens; `combine_metrics` puts those of a step's batches together. Values on
    padding may be anything: the mask enters before any exponential.
    """
    mask = batch.mask.astype(mx.float32)
    logprobs = mx.where(mask > 0, logprobs, 0.0)
    old = _field(batch, "old_logprobs", mask)
    old = mx.stop_gradient(logprobs) if old is None else old
    advantages = batch.advantages if batch.advantages.ndim == 2 else batch.advantages[:, None]
    advantages = mx.where(mask > 0, advantages, 0.0)
    terms = Terms(logprobs, old, log_ratios(logprobs, old, mask, cfg.preset.ratio), advantages, mask)
    metrics = {"tokens": mask.sum(), **_clip_metrics(terms, cfg, custom)}
    per_token = custom(logprobs, _filled(batch, terms), cfg) if custom else SURROGATES[cfg.preset.surrogate](terms, cfg)
    per_token = per_token * _sampler_factor(batch, terms, cfg, metrics)
    beta = getattr(batch, "beta", None)
    reference = _field(batch, "ref_logprobs", mask)
    if cfg.kl_in == "loss" and (cfg.beta > 0 or cfg.beta_end) and not (reference is None and cfg.beta_end is not None):
        if reference is None:
            raise ValueError("beta > 0 needs ref_logprobs in the batch")
        kl = kl_estimate(logprobs, reference, cfg.kl_estimator)
        kl = bounded_exp(logprobs - old) * kl if cfg.kl_importance else kl
        per_token = per_token + (cfg.beta if beta is None else beta) * kl
        metrics["kl"] = _mean(kl, mask)
    if entropies is not None:
        entropies = mx.where(mask > 0, entropies, 0.0)
        metrics["entropy"] = _mean(entropies, mask)
    if cfg.entropy_coef > 0:
        if entropies is None:
            raise ValueError("entropy_coef > 0 needs entropies")
        per_token = per_token - cfg.entropy_coef * entropies
    loss = mx.where(mask > 0, batch.weights * per_token, 0.0).sum()
    return loss, {name: mx.stop_gradient(value) for name, value in metrics.items()}


def _filled(batch: Any, terms: Terms) -> SimpleNamespace:
    """The batch as a custom loss sees it: every field `[B, T]` with 0 on padding, the ones that were absent filled."""
    optional = {name: _field(batch, name, terms.mask) for name in ("ref_logprobs", "sampling_logprobs")}
    return SimpleNamespace(
        mask=terms.mask,
        weights=mx.where(terms.mask > 0, batch.weights, 0.0),
        advantages=terms.advantages,
        old_logprobs=terms.old_logprobs,
        **optional,
    )


def _sampler_factor(batch: Any, terms: Terms, cfg: LossConfig, metrics: Metrics) -> mx.array:
    """The off-policy mask times the correction for the sampler; measures the raw ratios on the way."""
    factor = mx.ones_like(terms.mask)
    sampler = getattr(batch, "sampling_logprobs", None)
    if cfg.off_policy_mask_threshold is not None:
        behaviour = terms.old_logprobs if sampler is None else mx.where(terms.mask > 0, sampler, 0.0)
        drift = behaviour - terms.logprobs
        drift = mx.where(mx.isnan(drift), 0.0, drift)
        factor = factor * off_policy_keep(drift, terms.advantages, terms.mask, cfg.off_policy_mask_threshold)
        metrics["off_policy_kept"] = _mean(factor, terms.mask)
    if sampler is None:
        if cfg.importance_sampling_correction != "none":
            raise ValueError("importance_sampling_correction needs sampling_logprobs in the batch")
        return factor
    drawn_from = getattr(batch, "sampler_logprobs", None)  # another distribution than the policy's, with filters
    old = mx.stop_gradient(terms.old_logprobs)
    if drawn_from is not None:
        unfiltered, _ = sampling_log_ratios(old, sampler, terms.mask)
        metrics[UNFILTERED_LOGP_DIFFERENCE] = _mean(mx.abs(unfiltered), terms.mask)
    token, sequence = sampling_log_ratios(old, sampler if drawn_from is None else drawn_from, terms.mask)
    metrics.update(_sampling_metrics(token, sequence, terms.mask))
    if cfg.importance_sampling_correction == "none":
        return factor
    return factor * importance_weights(token, sequence, cfg)


def _field(batch: Any, name: str, mask: mx.array) -> mx.array | None:
    """A field of the batch, if it has one, with 0 on padding."""
    value = getattr(batch, name, None)
    return None if value is None else mx.where(mask > 0, value, 0.0)


def _mean(values: mx.array, mask: mx.array) -> mx.array:
    return (values * mask).sum() / mx.maximum(mask.sum(), 1)


def _clip_metrics(terms: Terms, cfg: LossConfig, custom: CustomLoss | None) -> Metrics:
    """Fractions of tokens beyond the bound that their advantage makes binding, by TRL's names; none without bounds."""
    if custom or cfg.preset.surrogate not in BOUNDED:
        return {}
    mask = terms.mask
    low, high = (beyond.astype(mx.float32) for beyond in BOUNDED[cfg.preset.surrogate](terms, cfg))
    metrics = {
        "clip_ratio/low_mean": _mean(low, mask),
        "clip_ratio/low_min": _over_rows(mean_over_tokens(low, mask), mask, 1.0).min(),
        "clip_ratio/high_mean": _mean(high, mask),
        "clip_ratio/high_max": _over_rows(mean_over_tokens(high, mask), mask, 0.0).max(),
        "clip_ratio/region_mean": _mean(low + high, mask),
    }
    if cfg.delta is not None:
        metrics["clip_ratio/delta_mean"] = _mean((terms.ratio > cfg.delta) & (terms.advantages < 0), mask)
    return metrics


def _sampling_metrics(token: mx.array, sequence: mx.array, mask: mx.array) -> Metrics:
    """How far the sampler's logprobs are from the trainer's; ratios are raw, before any truncation."""
    ratio, whole = bounded_exp(token), bounded_exp(sequence)
    return {
        LOGP_DIFFERENCE: _mean(mx.abs(token), mask),
        "sampling/sampling_logp_difference/max": (mx.abs(token) * mask).max(),
        "sampling/importance_sampling_ratio/min": mx.where(mask > 0, ratio, mx.inf).min(),
        "sampling/importance_sampling_ratio/mean": _mean(ratio, mask),
        "sampling/importance_sampling_ratio/max": mx.where(mask > 0, ratio, -mx.inf).max(),
        "sampling/sequence_importance_sampling_ratio/min": _over_rows(whole, mask, mx.inf).min(),
        "sampling/sequence_importance_sampling_ratio/max": _over_rows(whole, mask, -mx.inf).max(),
        "sampling/effective_sample_size": effective_sample_size(ratio, mask),
    }


def _over_rows(values: mx.array, mask: mx.array, empty: float) -> mx.array:
    """Values of rows, `[B, 1]`, with `empty` for rows without tokens."""
    return mx.where(mask.sum(axis=1, keepdims=True) > 0, values, empty)
