"""Alarms about user code that fails: rewards, environments and tools."""

from __future__ import annotations

from statistics import fmean

from grpo.alarms.past import RATES, PastSteps, known
from grpo.alarms.terms import AlarmTerms, Sign
from grpo.environments.failedcalls import first_failed
from grpo.types import StepMetrics

STEPS, FEW = 10, 5
"""Number of steps over which failures of rewards are averaged, and failures of tools."""
LONGEST = 300
"""Maximum number of characters of an error in an alarm."""


def failed_rewards(past: PastSteps, metrics: StepMetrics, terms: AlarmTerms) -> Sign | None:
    """Raised if a reward or an environment failed on too many recent completions."""
    most, recent = terms.alarms.failed_rewards, past.recent[-STEPS:]
    if most is None:
        return None
    names = dict.fromkeys(name for numbers in recent for name in numbers if name.endswith(RATES))
    rates: dict[str, dict[str, float]] = {}
    for name in names:
        reward, _, kind = name.removeprefix("rewards/").removesuffix("_rate").rpartition("/")
        rates.setdefault(reward, {})[kind] = fmean(known(recent, name))
    failing = {reward: kinds for reward, kinds in rates.items() if sum(kinds.values()) > most}
    if not failing:
        return None
    over = f"of the last {len(recent)} steps" if len(recent) > 1 else "of this step"
    said = "; ".join(f"{reward!r} failed on {_kinds(kinds)}" for reward, kinds in failing.items())
    own = not failing.keys() - set(terms.environments)
    trial = "" if own else ", and try the reward on the run's completions (grpo rewards score)"
    setting = "environment.timeout" if own else "the timeout of this entry of rewards"
    return Sign(
        f"{said} of the completions {over}{_first_error(metrics, failing)}",
        f"A completion without a reward is left out of training. Look at the error{trial}. If it only needs more time, "
        f"raise {setting}.",
    )


def failed_calls(past: PastSteps, metrics: StepMetrics, terms: AlarmTerms) -> Sign | None:
    """Raised if too many tool calls fail: in the current step, and averaged over the last `FEW` steps."""
    most, first = terms.alarms.failed_calls, first_failed(metrics.groups)
    if most is None or first is None:
        return None
    talks = [rollout.trajectory.conversation for group in metrics.groups for rollout in group.rollouts]
    calls, failed = (sum(getattr(talk, name) for talk in talks if talk) for name in ("calls", "failed_calls"))
    lately = past.mean("tools/failure_frequency", FEW)
    if failed <= most * calls or (lately is not None and lately <= most):
        return None
    return Sign(
        f"{failed:,} of {calls:,} tool calls failed, the first in {first[0]!r}: {_shortened(first[1])}",
        "The model reads these errors as results, and continues. If the tool should not fail, stop the run and fix it.",
    )


def _kinds(kinds: dict[str, float]) -> str:
    """Rates as text: `12% (timeout)`, `12% (8% error, 4% timeout)`."""
    some = {kind: rate for kind, rate in kinds.items() if rate > 0}
    if len(some) == 1:
        ((kind, rate),) = some.items()
        return f"{rate:.0%} ({kind})"
    return f"{sum(some.values()):.0%} ({', '.join(f'{rate:.0%} {kind}' for kind, rate in some.items())})"


def _first_error(metrics: StepMetrics, failing: dict[str, dict[str, float]]) -> str:
    """The first error of this step, as the end of a sentence; empty if there is no error."""
    failures = (rollout.failures for group in metrics.sampled for rollout in group.rollouts)
    for failure in (failed[name] for failed in failures for name in failing if name in failed):
        return f"; the first error: {_shortened(failure.error.partition(chr(10))[0])}"
    return ""


def _shortened(error: str) -> str:
    return " ".join(error.split())[:LONGEST].rstrip(".")
