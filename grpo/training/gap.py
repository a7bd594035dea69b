"""Stops a run at a step whose sampler's and trainer's logprobs differ by much more than rounding explains.

What differs by less is told by the alarm `sampler` (`grpo.alarms.sampler`).
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
    values of so many bits."""
    return rounding(policy.dtype, kv_bits) / min(1.0, policy.temperature)


def gap_of(metrics: Mapping[str, float]) -> float | None:
    """A step's mean gap in nats; None where nothing was trained on. Where filters reshape what is sampled, the logprobs
    before them count."""
    return metrics.get(UNFILTERED_LOGP_DIFFERENCE, metrics.get(LOGP_DIFFERENCE))


@dataclass(frozen=True, slots=True)
class Explained:
    """The gap that rounding explains: `bound` in nats, where it comes from, and what makes it smaller."""

    bound: float
    rounding: str
    remedy: str

    @classmethod
    def of(cls, policy: Policy, kv_bits: int | None = None) -> Explained:
        """For a policy, and a sampler with keys and values of `kv_bits`."""
        source = f"rounding in {str(policy.dtype).rpartition('.')[2]}"
        source += f" and in keys and values of {kv_bits} bits (rollout.kv_bits)" if kv_bits else ""
        finer = "" if policy.dtype == mx.float32 else "model.dtype: float32, and "
        finer = f"no rollout.kv_bits, {finer}" if kv_bits else finer
        remedy = f"Where rounding is the cause, {finer}MLX_ENABLE_TF32=0 on CUDA would make it smaller."
        return cls(gap_bound(policy, kv_bits), source, remedy)

    def times(self, gap: float) -> float:
        """How many times the bound a gap is; infinite for NaN."""
        return math.inf if math.isnan(gap) else gap / self.bound

    def said(self, gap: float) -> str:
        """A gap in words, without a full stop."""
        if math.isnan(gap):
            return "the sampler gave NaN for the logprobs of some tokens"
        return (
            f"the sampler's logprobs are {gap:.2g} nats from the trainer's in the mean, {self.times(gap):.1f} times "
            f"what {self.rounding} explains ({self.bound:.1g})"
        )


class GapWatch:
    """Stops a run whose gap is much larger than rounding explains, before the update is applied."""

    def __init__(self, policy: Policy, most: float | None, kv_bits: int | None = None) -> None:
        """`most` is `optim.max_logp_difference`. The sampler has keys and values of `kv_bits`."""
        self.explained, self._most = Explained.of(policy, kv_bits), most

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raise RunError where the gap in an update's `metrics` is beyond `most` times the bound."""
        gap, explained = gap_of(metrics), self.explained
        if gap is not None and self._most is not None and not explained.times(gap) <= self._most:
            raise RunError(
                f"step {step}: {explained.said(gap)}. The run stops beyond {self._most:g} times "
                "(optim.max_logp_difference; null never stops). This update is not applied. Decoding computes another "
                f"model than the one that trains: please report it, with `grpo doctor --json`. {explained.remedy}"
            )
