"""Checks at every step that the sampler's logprobs and the trainer's differ by no more than rounding explains."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import mlx.core as mx

from grpo.errors import RunError
from grpo.model.logprobs import rounding
from grpo.model.policy import Policy
from grpo.objective.measures import LOGP_DIFFERENCE, UNFILTERED_LOGP_DIFFERENCE

log = logging.getLogger(__name__)

WARN_FROM = 3.0
"""A gap of at least this many times the bound is reported."""


def gap_bound(policy: Policy, kv_bits: int | None = None) -> float:
    """The mean gap of logprobs, in nats, that rounding explains at the policy's dtype and temperature, with keys and
    values of so many bits."""
    return rounding(policy.dtype, kv_bits) / min(1.0, policy.temperature)


class GapWatch:
    """Warns of a step whose gap is larger than rounding explains, and stops the run if it is much larger."""

    def __init__(self, policy: Policy, most: float | None, tells: bool = True, kv_bits: int | None = None) -> None:
        """`most` is `optim.max_logp_difference`. With several processes only one `tells`, but all stop. The sampler has
        keys and values of `kv_bits`."""
        self._bound, self._most, self._tells = gap_bound(policy, kv_bits), most, tells
        self._rounding = f"rounding in {str(policy.dtype).rpartition('.')[2]}"
        self._rounding += f" and in keys and values of {kv_bits} bits (rollout.kv_bits)" if kv_bits else ""
        finer = "" if policy.dtype == mx.float32 else "model.dtype: float32, and "
        finer = f"no rollout.kv_bits, {finer}" if kv_bits else finer
        self._help = f"Where rounding is the cause, {finer}MLX_ENABLE_TF32=0 on CUDA would make it smaller."
        self._told = 0.0

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warn from `WARN_FROM` times the bound on, and again whenever the gap has doubled.

        `metrics` are the update's; without any, nothing was trained on and nothing is known. Where filters reshape
        what is sampled, the logprobs before them count. Raises RunError beyond `most` times the bound.
        """
        gap = metrics.get(UNFILTERED_LOGP_DIFFERENCE, metrics.get(LOGP_DIFFERENCE))
        if gap is None:
            return
        times = math.inf if math.isnan(gap) else gap / self._bound
        if self._most is not None and not times <= self._most:
            raise RunError(
                f"{self._said(step, gap)} The run stops beyond {self._most:g} times (optim.max_logp_difference; null "
                "never stops). This update is not applied. Decoding computes another model than the one that "
                f"trains: please report it, with `grpo doctor --json`. {self._help}"
            )
        if self._tells and times > self._told and times >= max(WARN_FROM, 2 * self._told):
            self._told = times
            log.warning("%s Decoding may drift away from the model that trains. %s", self._said(step, gap), self._help)

    def _said(self, step: int, gap: float) -> str:
        if math.isnan(gap):
            return f"step {step}: the sampler gave NaN for the logprobs of some tokens."
        return (
            f"step {step}: the sampler's logprobs are {gap:.2g} nats from the trainer's in the mean, "
            f"{gap / self._bound:.1f} times what {self._rounding} explains ({self._bound:.1g})."
        )
