"""Alarms about lengths: truncated completions, and a reward that follows only length."""

from __future__ import annotations

from grpo.alarms.past import LENGTH_SUMS, PastSteps, length_correlation
from grpo.alarms.terms import AlarmTerms, Sign
from grpo.types import StepMetrics

FEW, STEPS = 5, 10
"""Number of steps over which truncation is averaged, and over which reward and length are correlated."""
MOSTLY = 0.5


def truncation(past: PastSteps, metrics: StepMetrics, terms: AlarmTerms) -> Sign | None:
    """Raised if too many completions end at the length limit, averaged over the last `FEW` steps."""
    most, cut = terms.alarms.truncated, past.mean("completions/clipped_ratio", FEW)
    if most is None or cut is None or cut <= most:
        return None
    added = any(not all(one.trajectory.trained) for group in metrics.groups for one in group.rollouts)
    room = " (which includes tokens that the environment adds)" if added else ""
    steps = min(FEW, len(past.recent))
    over = f" in the last {steps} steps" if steps > 1 else ""
    return Sign(
        f"{cut:.0%} of the completions{over} were truncated at rollout.max_completion_length "
        f"({terms.rollout.max_completion_length:,} tokens){room}, most of them before their answer",
        "Raise it, or ask for shorter answers in the prompt. rollout.max_repeats ends completions that repeat "
        "themselves earlier.",
    )


def length(past: PastSteps, _: StepMetrics, terms: AlarmTerms) -> Sign | None:
    """Raised if, within prompts, the reward correlates strongly with a completion's length.

    Not raised if most prompts have equal rewards: the few other prompts are too little evidence.
    """
    least, steps = terms.alarms.length_correlation, past.recent[-STEPS:]
    if least is None or len(past.last(LENGTH_SUMS[0], STEPS)) < STEPS:
        return None
    r, equal = length_correlation(steps), past.mean("frac_reward_zero_std", STEPS) or 0.0
    if r is None or abs(r) < least or equal > MOSTLY:
        return None
    first, last = past.first[0], past.recent[-1]
    longer, name = ("longer" if r > 0 else "shorter"), "completions/mean_length"
    return Sign(
        f"the reward follows length alone: within prompts, the correlation of reward and length was {r:.2f} over the "
        f"last {STEPS} steps ({longer} is better; the mean length went from {first[name]:.0f} to "
        f"{last[name]:.0f} tokens)",
        f"Read the completions with the highest reward. If they are only {longer} and no better, make the reward "
        "check the answer, or lower the weight of the reward that counts length.",
    )
