"""Surrogates: the loss of each token, to be minimized, from its ratio and advantage. Formulas: grpo/presets.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from grpo.config import LossConfig
from grpo.objective.ratios import bounded_exp, mean_over_tokens
from grpo.presets import Surrogate

DPPO_CEILING = 20.0
"""Upper bound of dppo's ratio to the sampler, as in verl and TRL."""
LEAST_WEIGHT = 1e-8
"""Lower bound of vespo's weights, as in its authors' code, so that their logarithm is finite."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The inputs of a surrogate, all `[B, T]` float32, 0 at untrained tokens.

    `current` is log p under the current policy. `denominator` is log p under the anchor (the policy before this step's
    first update; for stale tokens, the policy that sampled), or for dppo under the sampling distribution. `log_ratio`
    is the log of their ratio, per token or per sequence, as the preset says. `correction` has the importance weights
    anchor / sampler; None if the loss has no correction.
    """

    current: mx.array
    denominator: mx.array
    log_ratio: mx.array
    advantages: mx.array
    trained: mx.array
    correction: mx.array | None = None

    @property
    def ratio(self) -> mx.array:
        return bounded_exp(self.log_ratio)


def clip(terms: Terms, cfg: LossConfig) -> mx.array:
    """PPO's pessimistic bound (arXiv 1707.06347), with a separate upper bound `epsilon_high` and TRL's cap `delta`."""
    ratio, preset = terms.ratio, cfg.preset
    clipped = mx.clip(ratio, 1 - preset.epsilon, 1 + preset.epsilon_high)
    first = ratio if cfg.delta is None else mx.minimum(ratio, cfg.delta)
    return -mx.minimum(first * terms.advantages, clipped * terms.advantages)


def cispo(terms: Terms, cfg: LossConfig) -> mx.array:
    """The gradient of -A lp, weighted by the ratio up to a ceiling, which removes no token (arXiv 2506.13585)."""
    return -mx.stop_gradient(mx.minimum(terms.ratio, cfg.epsilon_max)) * terms.advantages * terms.current


def sapo(terms: Terms, cfg: LossConfig) -> mx.array:
    """A sigmoid gate instead of a bound (arXiv 2511.20347)."""
    tau = mx.where(terms.advantages > 0, cfg.sapo_temperature_pos, cfg.sapo_temperature_neg)
    return -(4 / tau) * mx.sigmoid(tau * (terms.ratio - 1)) * terms.advantages


def vespo(terms: Terms, cfg: LossConfig) -> mx.array:
    """The gradient of -A lp, weighted by a gamma-shaped function of the whole completion's ratio: 1 at ratio 1.

    The ratio is current / anchor. With a correction, the ratio is multiplied by the correction's weights (anchor /
    sampler), which makes it current / sampler; the loss is then not multiplied by them. The authors' code and TRL do
    the same.
    """
    log_ratio = terms.log_ratio
    if terms.correction is not None:
        log_ratio = log_ratio + mx.log(mx.maximum(terms.correction, LEAST_WEIGHT))
    log_w = mx.maximum((log_ratio * terms.trained).sum(axis=1, keepdims=True), math.log(LEAST_WEIGHT))
    positive = terms.advantages >= 0
    k = mx.where(positive, cfg.vespo_k_pos, cfg.vespo_k_neg)
    scale = mx.where(positive, cfg.vespo_lambda_pos, cfg.vespo_lambda_neg)
    phi = mx.exp(scale + k * log_w - scale * bounded_exp(log_w))
    return -mx.stop_gradient(phi) * terms.advantages * terms.current


def gmpo(terms: Terms, cfg: LossConfig) -> mx.array:
    """The geometric mean of a completion's ratios, each bounded in its advantage's direction (arXiv 2507.20673)."""
    preset = cfg.preset
    above = mx.minimum(terms.log_ratio, preset.epsilon_high)
    below = mx.maximum(terms.log_ratio, -preset.epsilon)
    bounded = mx.where(terms.advantages > 0, above, below)
    return -terms.advantages * bounded_exp(mean_over_tokens(bounded, terms.trained))


def dppo(terms: Terms, cfg: LossConfig) -> mx.array:
    """The gradient of -A lp, weighted by the ratio to the sampler, for tokens inside the trust region.

    A token leaves the region when its probability has moved too far from the sampler's in the direction of its
    advantage. The sampler is the batch's `sampler`, or `behaviour` if no filter changed the distribution. The anchor
    replaces these only where they are NaN.

    This is DPPO-Binary-TV as in the paper (arXiv 2602.04879) and its authors' code (sail-sg/Stable-RL, and in verl),
    which has no penalty. The ln² r is the KL term of Kimi K2.5 (arXiv 2602.02276). prime-rl adds it to DPPO with a
    weight of 1e-3 on every token, even outside the region; `dppo_penalty` (default 0) does the same.
    """
    low, high = _beyond_probability(terms, cfg)
    weight = mx.where(low | high, 0.0, mx.minimum(terms.ratio, DPPO_CEILING))
    return -mx.stop_gradient(weight) * terms.advantages * terms.current + cfg.dppo_penalty * terms.log_ratio**2


def reinforce(terms: Terms, cfg: LossConfig) -> mx.array:
    """The score-function estimator (Williams 1992)."""
    del cfg
    return -terms.advantages * terms.current


SURROGATES: dict[Surrogate, Callable[[Terms, LossConfig], mx.array]] = {
    "clip": clip,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
    "gmpo": gmpo,
    "dppo": dppo,
    "reinforce": reinforce,
}


def _beyond_ratio(terms: Terms, cfg: LossConfig) -> tuple[mx.array, mx.array]:
    low, high = terms.ratio < 1 - cfg.preset.epsilon, terms.ratio > 1 + cfg.preset.epsilon_high
    return low & (terms.advantages < 0), high & (terms.advantages > 0)


def _beyond_log_ratio(terms: Terms, cfg: LossConfig) -> tuple[mx.array, mx.array]:
    low, high = terms.log_ratio < -cfg.preset.epsilon, terms.log_ratio > cfg.preset.epsilon_high
    return low & (terms.advantages < 0), high & (terms.advantages > 0)


def _beyond_ceiling(terms: Terms, cfg: LossConfig) -> tuple[mx.array, mx.array]:
    """The ceiling caps a token's weight whatever the sign of its advantage; there is no lower bound."""
    return mx.zeros(terms.trained.shape, mx.bool_), (terms.ratio > cfg.epsilon_max) & (terms.advantages != 0)


def _beyond_probability(terms: Terms, cfg: LossConfig) -> tuple[mx.array, mx.array]:
    moved = mx.exp(terms.current) - mx.exp(terms.denominator)
    low, high = moved < -cfg.preset.epsilon, moved > cfg.preset.epsilon_high
    return low & (terms.advantages <= 0), high & (terms.advantages > 0)


BOUNDED: dict[Surrogate, Callable[[Terms, LossConfig], tuple[mx.array, mx.array]]] = {
    "clip": _beyond_ratio,
    "cispo": _beyond_ceiling,
    "gmpo": _beyond_log_ratio,
    "dppo": _beyond_probability,
}
"""For each surrogate with bounds, the function that finds the tokens beyond its lower and upper bounds."""
