"""Stops a run at a step in which the sampler's and the trainer's logprobs differ by much more than rounding explains.

Smaller differences raise the alarm `sampler` (`grpo.alarms.sampler`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from grpo.errors import RunError
from grpo.model.logprobs import rounding
from grpo.model.policy import Policy
from grpo.objective.measures import LOGP_DIFFERENCE, UNFILTERED_LOGP_DIFFERENCE


def gap_bound(policy: Policy, kv_bits: int | None = None) -> float:
    """The mean gap of logprobs, in nats, that rounding explains at the policy's dtype and temperature, with keys and
    values of `kv_bits` bits (None: not quantized)."""
    return rounding(policy.dtype, kv_bits) / min(1.0, policy.temperature)


def gap_of(metrics: Mapping[str, float]) -> float | None:
    """A step's mean gap in nats; None if nothing was trained. With sampling filters, of unfiltered logprobs."""
    return metrics.get(UNFILTERED_LOGP_DIFFERENCE, metrics.get(LOGP_DIFFERENCE))


@dataclass(frozen=True, slots=True)
class Explained:
    """The gap that rounding explains: `bound` in nats, the source of the rounding, and how to reduce it."""

    bound: float
    rounding: str
    remedy: str

    @classmethod
    def of(cls, policy: Policy, kv_bits: int | None = None) -> Explained:
        """The gap for a policy and a sampler with keys and values of `kv_bits` bits."""
        source = f"rounding in {str(policy.dtype).rpartition('.')[2]}"
        source += f" and in keys and values of {kv_bits} bits (rollout.kv_bits)" if kv_bits else ""
        finer = "" if policy.dtype == mx.float32 else "model.dtype: float32, and "
        finer = f"no rollout.kv_bits, {finer}" if kv_bits else finer
        remedy = f"If rounding is the cause, reduce it with {finer}MLX_ENABLE_TF32=0 on CUDA."
        return cls(gap_bound(policy, kv_bits), source, remedy)

    def times(self, gap: float) -> float:
        """The ratio of a gap to the bound; infinite for NaN."""
        return math.inf if math.isnan(gap) else gap / self.bound

    def said(self, gap: float) -> str:
        """A description of a gap, without a final period."""
        if math.isnan(gap):
            return "the sampler's logprobs of some tokens are NaN"
        return (
            f"the sampler's logprobs differ from the trainer's by {gap:.2g} nats on average, {self.times(gap):.1f} "
            f"times what {self.rounding} explains ({self.bound:.1g})"
        )


class GapWatch:
    """Stops a run whose gap is much larger than rounding explains, before the update is applied."""

    def __init__(self, policy: Policy, most: float | None, kv_bits: int | None = None) -> None:
        """`most` is `optim.max_logp_difference`, and `kv_bits` is `rollout.kv_bits`."""
        self.explained, self._most = Explained.of(policy, kv_bits), most

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raise RunError if the gap in an update's `metrics` is more than `most` times the bound."""
        gap, explained = gap_of(metrics), self.explained
        if gap is not None and self._most is not None and not explained.times(gap) <= self._most:
            raise RunError(
                f"step {step}: {explained.said(gap)}. The run stops beyond {self._most:g} times "
                "(optim.max_logp_difference; null never stops it). This update was not applied. Decoding and training "
                f"do not compute the same model: please report this, with `grpo doctor --json`. {explained.remedy}"
            )
