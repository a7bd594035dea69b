"""Estimators of the KL divergence from the policy to the reference, from the sampled tokens (Schulman 2020)."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from grpo.objective.ratios import bounded_exp

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: mx.array, reference: mx.array, estimator: Estimator) -> mx.array:
    """The estimate for each token, with `d = reference - logprobs`; 0 where the two agree.

        k1  -d           gradient 1 with respect to logprobs: an unbiased value, but a gradient of mean 0 on policy
        k2  d² / 2       gradient -d: on policy, the gradient of the reverse KL
        k3  e^d - d - 1  gradient 1 - e^d; never negative; GRPO's form (arXiv 2402.03300, eq. 4)

    Multiplied by the ratio, k3 also has the gradient -d of the reverse KL on policy.
    """
    d = reference - logprobs
    match estimator:
        case "k1":
            return -d
        case "k2":
            return d * d / 2
        case "k3":
            return bounded_exp(d) - d - 1
