"""The metrics of a loss, over the batch's trained tokens, under TRL's names."""

from __future__ import annotations

import mlx.core as mx

from grpo.config import LossConfig
from grpo.objective.corrections import drawn_from, effective_sample_size, sampling_log_ratios
from grpo.objective.metrics import FRESH, TOKENS
from grpo.objective.ratios import bounded_exp, mean_over_tokens
from grpo.objective.surrogates import BOUNDED, Terms
from grpo.presets import Surrogate
from grpo.types import Batch

Metrics = dict[str, mx.array]

LOGP_DIFFERENCE = "sampling/sampling_logp_difference/mean"
UNFILTERED_LOGP_DIFFERENCE = "sampling/unfiltered_logp_difference/mean"
"""The same difference for `behaviour`. Present only if filters changed the distribution that tokens were drawn from."""


def mean(values: mx.array, trained: mx.array) -> mx.array:
    """The mean of `[B, T]` over trained tokens; 0 if there are none."""
    return (values * trained).sum() / mx.maximum(trained.sum(), 1)


def counts(batch: Batch) -> Metrics:
    """The number of tokens that the batch trains on; if it has the column `stale`, also the number of fresh tokens."""
    tokens = {TOKENS: batch.trained.sum()}
    return tokens if batch.stale is None else {**tokens, FRESH: _fresh(batch).sum()}


def _fresh(batch: Batch) -> mx.array:
    """The mask of the trained tokens that this step's policy sampled: `[B, T]` float32."""
    return batch.trained if batch.stale is None else batch.trained * (1 - batch.stale)


def clip_metrics(terms: Terms, cfg: LossConfig, surrogate: Surrogate | None) -> Metrics:
    """Fractions of tokens beyond the bound for the sign of their advantage; empty if the surrogate has no bounds."""
    if surrogate not in BOUNDED:
        return {}
    trained = terms.trained
    low, high = (beyond.astype(mx.float32) for beyond in BOUNDED[surrogate](terms, cfg))
    metrics = {
        "clip_ratio/low_mean": mean(low, trained),
        "clip_ratio/low_min": _over_rows(mean_over_tokens(low, trained), trained, 1.0).min(),
        "clip_ratio/high_mean": mean(high, trained),
        "clip_ratio/high_max": _over_rows(mean_over_tokens(high, trained), trained, 0.0).max(),
        "clip_ratio/region_mean": mean(low + high, trained),
    }
    if cfg.delta is not None:
        metrics["clip_ratio/delta_mean"] = mean((terms.ratio > cfg.delta) & (terms.advantages < 0), trained)
    return metrics


def sampler_metrics(batch: Batch) -> Metrics:
    """How far the sampling logprobs are from the anchor's logprobs. Ratios are not truncated.

    The anchor is the policy that sampled, as the update computes it. So the difference shows where decoding and the
    update disagree, and what filters changed. Stale tokens are left out: their anchor is the sampler's own logprob,
    which would hide a gap.
    """
    sampler = drawn_from(batch)
    if sampler is None:
        return {}
    assert batch.anchor is not None
    assert batch.behaviour is not None
    anchor, trained = batch.anchor, _fresh(batch)
    token, sequence = sampling_log_ratios(mx.stop_gradient(anchor), sampler, trained)
    unfiltered: Metrics = {}
    if batch.sampler is not None:
        unfiltered[UNFILTERED_LOGP_DIFFERENCE] = _difference(anchor, batch.behaviour, trained)
    ratio, whole = bounded_exp(token), bounded_exp(sequence)
    return {
        **unfiltered,
        LOGP_DIFFERENCE: _difference(anchor, sampler, trained),
        "sampling/sampling_logp_difference/max": (mx.abs(token) * trained).max(),
        "sampling/importance_sampling_ratio/min": mx.where(trained > 0, ratio, mx.inf).min(),
        "sampling/importance_sampling_ratio/mean": mean(ratio, trained),
        "sampling/importance_sampling_ratio/max": mx.where(trained > 0, ratio, -mx.inf).max(),
        "sampling/sequence_importance_sampling_ratio/min": _over_rows(whole, trained, mx.inf).min(),
        "sampling/sequence_importance_sampling_ratio/max": _over_rows(whole, trained, -mx.inf).max(),
        "sampling/effective_sample_size": effective_sample_size(ratio, trained),
    }


def _difference(anchor: mx.array, other: mx.array, trained: mx.array) -> mx.array:
    """The mean absolute difference of logprobs. NaN if any logprob is NaN: corrections ignore NaN, checks must not."""
    return mean(mx.where(trained > 0, mx.abs(anchor - other), 0.0), trained)


def _over_rows(values: mx.array, trained: mx.array, empty: float) -> mx.array:
    """The values `[B, 1]`, replaced by `empty` for rows without trained tokens."""
    return mx.where(trained.sum(axis=1, keepdims=True) > 0, values, empty)
