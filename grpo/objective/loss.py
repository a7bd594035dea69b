"""The clipped policy loss."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from grpo.config import LossConfig
from grpo.objective.kl import k3

Metrics = dict[str, mx.array]


def policy_loss(
    logprobs: mx.array, batch: Any, cfg: LossConfig, entropies: mx.array | None = None
) -> tuple[mx.array, Metrics]:
    """The loss of a batch, to be minimised, and what it measured.

    logprobs `[B, T]` float32 of the current policy, differentiable; entropies `[B, T]` or None. `batch` has
    `mask`, `weights` `[B, T]` and `advantages` `[B]`, and may have `old_logprobs`, `ref_logprobs` and
    `sampling_logprobs` `[B, T]`: without `old_logprobs` they are the current ones, and the ratio is exactly 1.

        r = exp(logprobs - old_logprobs)
        loss = Σ weights · ( -min(r A, clip(r, 1 - ε, 1 + ε_high) A) + β · k3 )

    Clipping as in PPO (arXiv 1707.06347), per token as in GRPO (arXiv 2402.03300, eq. 3), with an upper bound of
    its own as in DAPO (arXiv 2503.14476). Raises ValueError when `cfg.beta` asks for `ref_logprobs` and there are
    none.

    The metrics are sums over the batch's tokens, so that batches of a step add up: divide by their
    `tokens`. Logprobs on padding may be anything finite: the mask enters before the exponential.
    """
    mask = batch.mask
    logprobs = mx.where(mask > 0, logprobs, 0.0)
    old = _optional(batch, "old_logprobs", mask)
    log_ratio = logprobs - (mx.stop_gradient(logprobs) if old is None else old)
    ratio = mx.exp(log_ratio)
    advantages = batch.advantages[:, None]
    low, high = 1 - cfg.epsilon, 1 + (cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high)
    per_token = -mx.minimum(ratio * advantages, mx.clip(ratio, low, high) * advantages)
    metrics = _clip_metrics(ratio, advantages, mask, low, high)
    if cfg.beta > 0:
        reference = _optional(batch, "ref_logprobs", mask)
        if reference is None:
            raise ValueError("beta > 0 needs ref_logprobs in the batch")
        kl = k3(logprobs, reference)
        per_token = per_token + cfg.beta * kl
        metrics["kl"] = (kl * mask).sum()
    if entropies is not None:
        metrics["entropy"] = (entropies * mask).sum()
    sampled = _optional(batch, "sampling_logprobs", mask)
    if sampled is not None:
        metrics["sampling/sampling_logp_difference/mean"] = mx.abs(logprobs - sampled).sum()
    loss = (batch.weights * per_token).sum()
    return loss, {name: mx.stop_gradient(value) for name, value in metrics.items()}


def _optional(batch: Any, name: str, mask: mx.array) -> mx.array | None:
    """A field of the batch, if it has one, with 0 on padding."""
    value = getattr(batch, name, None)
    return None if value is None else mx.where(mask > 0, value, 0.0)


def _clip_metrics(ratio: mx.array, advantages: mx.array, mask: mx.array, low: float, high: float) -> Metrics:
    """Tokens whose ratio is beyond the bound that their advantage makes binding, by TRL's names."""
    clipped_low = (ratio < low) & (advantages < 0)
    clipped_high = (ratio > high) & (advantages > 0)
    return {
        "tokens": mask.sum(),
        "clip_ratio/low_mean": (clipped_low * mask).sum(),
        "clip_ratio/high_mean": (clipped_high * mask).sum(),
        "clip_ratio/region_mean": ((clipped_low | clipped_high) * mask).sum(),
    }
