"""Estimators of the KL divergence to the reference, from the sampled tokens (Schulman 2020)."""

from __future__ import annotations

import mlx.core as mx


def k3(logprobs: mx.array, ref_logprobs: mx.array) -> mx.array:
    """`e^d - d - 1` with `d = ref - current`, per token: never negative, 0 where the two agree.

    The form of GRPO (arXiv 2402.03300, eq. 4). Its gradient with respect to `logprobs` is `1 - e^d`.
    """
    d = ref_logprobs - logprobs
    return mx.exp(d) - d - 1
