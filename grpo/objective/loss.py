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
        sampling_logprobs  that the sampler gave; for the correction and for dppo, and measured wherever they are
        sampler_logprobs   of the distribution sampled from, where filters made it another one: read in their place then
        beta               a scalar array, the penalty's weight now, in the place of `cfg.beta`

    `custom`, a function `(logprobs, batch, cfg) -> per_token_loss`, takes the surrogate's place. Its batch has every
    field above as `[B, T]`: old_logprobs always, the other optional ones or None.

    `batch.entropies` `[B, T]`, if there are some, is what the metric `entropy` is of, in the place of `entropies`.

    loss = Σ weights · (keep · w · surrogate(ratio, A) + β · KL - c · entropy), where keep and w are the off-policy mask
    and the sampler's correction (which vespo takes into its own weight instead). The formulas are in grpo/presets.py.
    Raises ValueError for a field that the settings need and the batch has not.

    Metrics are over the batch's masked tokens; `combine_metrics` puts those of a step's batches together. Values on
    padding may be anything: the mask enters before any exponential.
    """
    mask = batch.mask.astype(mx.float32)
    logprobs = mx.where(mask > 0, logprobs, 0.0)
    old = _field(batch, "old_logprobs", mask)
    old = mx.stop_gradient(logprobs) if old is None else old
    advantages = batch.advantages if batch.advantages.ndim == 2 else batch.advantages[:, None]
    advantages = mx.where(mask > 0, advantages, 0.0)
    surrogate = None if custom else cfg.preset.surrogate
    metrics = {"tokens": mask.sum(), **_sampler_metrics(batch, old, mask)}
    correction = _correction(batch, old, mask, cfg)
    start = _sampled_from(batch, old, mask) if surrogate == "dppo" else old
    log_ratio = log_ratios(logprobs, start, mask, cfg.preset.ratio)
    terms = Terms(logprobs, start, log_ratio, advantages, mask, correction)
    metrics |= _clip_metrics(terms, cfg, custom)
    per_token = SURROGATES[surrogate](terms, cfg) if surrogate else _custom(custom, terms, old, batch, cfg)
    if correction is not None and surrogate != "vespo":
        per_token = per_token * correction
    if cfg.off_policy_mask_threshold is not None:
        keep = _kept(batch, terms, old, cfg.off_policy_mask_threshold)
        per_token, metrics["off_policy_kept"] = per_token * keep, _mean(keep, mask)
    if (kl := _kl(batch, terms, cfg)) is not None:
        beta = getattr(batch, "beta", None)
        per_token = per_token + (cfg.beta if beta is None else beta) * kl
        metrics["kl"] = _mean(kl, mask)
    if entropies is not None:
        entropies = mx.where(mask > 0, entropies, 0.0)
        measured = _field(batch, "entropies", mask)
        metrics["entropy"] = _mean(entropies if measured is None else measured, mask)
    if cfg.entropy_coef > 0:
        if entropies is None:
            raise ValueError("entropy_coef > 0 needs entropies")
        per_token = per_token - cfg.entropy_coef * entropies
    loss = mx.where(mask > 0, batch.weights * per_token, 0.0).sum()
    return loss, {name: mx.stop_gradient(value) for name, value in metrics.items()}


def _custom(custom: Any, terms: Terms, old: mx.array, batch: Any, cfg: LossConfig) -> mx.array:
    """A custom loss of the batch as it sees it: every field `[B, T]`, 0 on padding, `old_logprobs` always there."""
    optional = {name: _field(batch, name, terms.mask) for name in ("ref_logprobs", "sampling_logprobs")}
    seen = SimpleNamespace(
        mask=terms.mask,
        weights=mx.where(terms.mask > 0, batch.weights, 0.0),
        advantages=terms.advantages,
        old_logprobs=old,
        **optional,
    )
    per_token: mx.array = custom(terms.logprobs, seen, cfg)
    return per_token


def _drawn_from(batch: Any) -> mx.array | None:
    """The logprobs of the distribution that was sampled from, with filters another than the policy's."""
    filtered = getattr(batch, "sampler_logprobs", None)
    return getattr(batch, "sampling_logprobs", None) if filtered is None else filtered


def _sampled_from(batch: Any, old: mx.array, mask: mx.array) -> mx.array:
    """The same with 0 on padding, and the policy's own logprob where the sampler's is NaN: `[B, T]`."""
    sampler = _drawn_from(batch)
    if sampler is None:
        raise ValueError("dppo needs sampling_logprobs in the batch")
    return mx.where(mask > 0, mx.where(mx.isnan(sampler), old, sampler), 0.0)


def _correction(batch: Any, old: mx.array, mask: mx.array, cfg: LossConfig) -> mx.array | None:
    """The weight of each token that corrects for the sampler, `[B, T]`; None without a correction."""
    if cfg.importance_sampling_correction == "none":
        return None
    sampler = _drawn_from(batch)
    if sampler is None:
        raise ValueError("importance_sampling_correction needs sampling_logprobs in the batch")
    return importance_weights(*sampling_log_ratios(mx.stop_gradient(old), sampler, mask), cfg)


def _kept(batch: Any, terms: Terms, old: mx.array, threshold: float) -> mx.array:
    """The off-policy mask, `[B, T]`: how far the policy has moved from where completions were sampled."""
    sampler = _field(batch, "sampling_logprobs", terms.mask)
    drift = (old if sampler is None else sampler) - terms.logprobs
    return off_policy_keep(mx.where(mx.isnan(drift), 0.0, drift), terms.advantages, terms.mask, threshold)


def _kl(batch: Any, terms: Terms, cfg: LossConfig) -> mx.array | None:
    """The KL estimate of each token, `[B, T]`; None where the loss has no penalty, or has none at this step."""
    if cfg.kl_in != "loss" or not (cfg.beta > 0 or cfg.beta_end):
        return None
    reference = _field(batch, "ref_logprobs", terms.mask)
    if reference is None:
        if cfg.beta_end is not None:  # the schedule is at 0
            return None
        raise ValueError("beta > 0 needs ref_logprobs in the batch")
    kl = kl_estimate(terms.logprobs, reference, cfg.kl_estimator)
    return bounded_exp(terms.logprobs - terms.old_logprobs) * kl if cfg.kl_importance else kl


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


def _sampler_metrics(batch: Any, old: mx.array, mask: mx.array) -> Metrics:
    """How far the sampler's logprobs are from the trainer's; ratios are raw, before any truncation."""
    sampler = _drawn_from(batch)
    if sampler is None:
        return {}
    token, sequence = sampling_log_ratios(mx.stop_gradient(old), sampler, mask)
    unfiltered: Metrics = {}
    if getattr(batch, "sampler_logprobs", None) is not None:
        unfiltered[UNFILTERED_LOGP_DIFFERENCE] = _difference(old, batch.sampling_logprobs, mask)
    ratio, whole = bounded_exp(token), bounded_exp(sequence)
    return {
        **unfiltered,
        LOGP_DIFFERENCE: _difference(old, sampler, mask),
        "sampling/sampling_logp_difference/max": (mx.abs(token) * mask).max(),
        "sampling/importance_sampling_ratio/min": mx.where(mask > 0, ratio, mx.inf).min(),
        "sampling/importance_sampling_ratio/mean": _mean(ratio, mask),
        "sampling/importance_sampling_ratio/max": mx.where(mask > 0, ratio, -mx.inf).max(),
        "sampling/sequence_importance_sampling_ratio/min": _over_rows(whole, mask, mx.inf).min(),
        "sampling/sequence_importance_sampling_ratio/max": _over_rows(whole, mask, -mx.inf).max(),
        "sampling/effective_sample_size": effective_sample_size(ratio, mask),
    }


def _difference(old: mx.array, sampler: mx.array, mask: mx.array) -> mx.array:
    """The mean absolute difference of logprobs; NaN where one is NaN, which a correction may pass over but no check."""
    return _mean(mx.where(mask > 0, mx.abs(old - sampler), 0.0), mask)


def _over_rows(values: mx.array, mask: mx.array, empty: float) -> mx.array:
    """Values of rows, `[B, 1]`, with `empty` for rows without tokens."""
    return mx.where(mask.sum(axis=1, keepdims=True) > 0, values, empty)
