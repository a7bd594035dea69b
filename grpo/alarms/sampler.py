"""Alarms about a mismatch of sampler and trainer: their logprobs differ, or their importance ratios are uneven."""

from __future__ import annotations

from grpo.alarms.past import PastSteps
from grpo.alarms.terms import AlarmTerms, Sign
from grpo.objective.metrics import SAMPLE_SIZE
from grpo.training.gap import gap_of
from grpo.types import StepMetrics

STEPS = 5
"""Number of steps over which the effective sample size is averaged."""


def sampler(_: PastSteps, metrics: StepMetrics, terms: AlarmTerms) -> Sign | None:
    """Raised if the logprobs of sampler and trainer differ by more than rounding explains."""
    least, gap = terms.alarms.logp_difference, gap_of(metrics.values)
    if least is None or gap is None or terms.explained.times(gap) < least:
        return None
    return Sign(
        terms.explained.said(gap),
        "Decoding may drift away from the model that trains: watch sampling/sampling_logp_difference/mean. "
        f"{terms.explained.remedy} optim.max_logp_difference sets when the run stops.",
    )


def ratios(past: PastSteps, _: StepMetrics, terms: AlarmTerms) -> Sign | None:
    """Raised if the importance ratios of trainer and sampler are so uneven that few tokens dominate."""
    least, sizes = terms.alarms.effective_sample_size, past.last(SAMPLE_SIZE, STEPS)
    if least is None or len(sizes) < STEPS or (size := sum(sizes) / len(sizes)) >= least:
        return None
    rollout = terms.rollout
    filters = [name for name in ("top_k", "top_p", "min_p", "repetition_penalty", "kv_bits") if name in rollout.changed]
    ways = f"A weaker {', '.join(f'rollout.{name}' for name in filters)} makes them more even. " if filters else ""
    return Sign(
        f"the importance ratios of trainer and sampler are uneven: sampling/effective_sample_size was {size:.2f} over "
        f"the last {STEPS} steps, so a few tokens dominate the correction",
        f"{ways}Look at sampling/importance_sampling_ratio/max. loss.importance_sampling_correction: token_truncate "
        "bounds the ratios.",
    )
