"""Alarms about metrics that explode or collapse: KL, gradient norm, entropy."""

from __future__ import annotations

from statistics import fmean, median

from grpo.alarms.past import FIRST, PastSteps, known
from grpo.alarms.terms import AlarmTerms, Sign
from grpo.types import StepMetrics

LATEST, BEFORE, ENOUGH = 3, 20, 8
"""The median gradient norm of the `LATEST` steps is compared with the median of up to `BEFORE` earlier steps, of which
at least `ENOUGH` must have a norm."""
STEPS = 10
"""Number of steps over which entropy is averaged."""
MOSTLY = 0.5


def kl(_: PastSteps, metrics: StepMetrics, terms: AlarmTerms) -> Sign | None:
    """Raised if the policy is far from the reference."""
    most, value = terms.alarms.kl, metrics.values.get("kl")
    if most is None or value is None or not value > most:
        return None
    return Sign(
        f"the KL from the reference is {value:.3g} nats per token: the policy is far from the model it started from",
        f"Read the last completions. If they are broken, go back to an earlier checkpoint and {terms.slower}.",
    )


def gradient(past: PastSteps, metrics: StepMetrics, terms: AlarmTerms) -> Sign | None:
    """Raised if the gradient norm is many times its earlier median, or not finite."""
    most, skipped = terms.alarms.grad_norm, metrics.values.get("skipped_updates", 0.0)
    if most is None:
        return None
    advice = f"Look at grad_norm and at the last completions. To fix it, {terms.slower}, or set optim.warmup_steps."
    if skipped:
        updates = "an update was" if skipped == 1 else f"{skipped:.0f} updates were"
        return Sign(
            f"{updates} skipped because the loss or the gradient was not finite",
            f"The folder not_finite/ of the run has the batches. {advice} model.dtype: float32 has more range.",
        )
    norms = [norm for norm in past.last("grad_norm", LATEST + BEFORE) if norm > 0]
    now, before = norms[-LATEST:], norms[:-LATEST]
    if len(before) < ENOUGH or (times := median(now) / median(before)) <= most:
        return None
    return Sign(
        f"the gradient's norm is {median(now):.3g}, {times:.0f} times its median over the {len(before)} steps before",
        f"grpo scales it down to optim.max_grad_norm, but its direction may be noise. {advice}",
    )


def entropy(past: PastSteps, _: StepMetrics, terms: AlarmTerms) -> Sign | None:
    """Raised if entropy has collapsed while the prompts are not solved: the policy no longer explores."""
    least, at_first = terms.alarms.entropy, known(past.first, "entropy")
    lately = past.last("entropy", STEPS)
    if least is None or len(at_first) < FIRST or len(lately) < STEPS or len(past.recent) < FIRST + STEPS:
        return None
    start, now = fmean(at_first), fmean(lately)
    equal, solved = (past.mean(name, STEPS) or 0.0 for name in ("frac_reward_zero_std", "solved_all"))
    if now >= least * start or equal <= MOSTLY or solved >= MOSTLY * equal:
        return None
    return Sign(
        f"entropy collapsed to {now:.2g} nats per token, {now / start:.0%} of its value in the first steps, while for "
        f"{equal - solved:.0%} of the prompts all completions get the same reward and are not solved",
        f"Compare the completions of one prompt: the model no longer explores. Raise loss.epsilon_high or "
        f"loss.entropy_coef, or {terms.slower}. A higher rollout.temperature restores variety for a while. If this "
        "reward is the highest possible, the run is done.",
    )
