"""Alarms about rewards without a learning signal: no rewards, or equal rewards."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from grpo.alarms.past import PastSteps
from grpo.alarms.terms import AlarmTerms, Sign
from grpo.scoring.own import mostly_cut, unrewarded
from grpo.types import FAILURES, Group, StepMetrics

SAMPLE_MORE = "more rollout.num_generations or a higher rollout.temperature make rewards differ more often"
SOLVED = 0.9
"""If at least this fraction of groups is solved completely, equal rewards count as success."""


def no_reward(past: PastSteps, metrics: StepMetrics, terms: AlarmTerms) -> Sign | None:
    """Raised if no completion of the first step has a reward."""
    if len(past.recent) > 1 or "reward" in metrics.values:
        return None
    taught = _taught(metrics)
    if taught and not any(terms.weights.values()):
        return None
    rates = tuple(f"/{kind}_rate" for kind in FAILURES)
    failed = any(value for name, value in metrics.values.items() if name.endswith(rates))
    why = why_none(terms.weights, terms.environments, failed, metrics.groups)
    learned = "the policy learned only from the teacher" if taught else "nothing was learned"
    return Sign(f"no completion has a reward, so {learned}", f"{why.rstrip('.')}.")


def equal_rewards(past: PastSteps, metrics: StepMetrics, _: AlarmTerms) -> Sign | None:
    """Raised if all rewards are equal within every group of the first step."""
    values = metrics.values
    if len(past.recent) > 1 or "reward" not in values or values["frac_reward_zero_std"] < 1 or _taught(metrics):
        return None
    if any(rollout.has_advantage for group in metrics.groups for rollout in group.rollouts):
        return None  # turns have advantages, or a penalty makes a difference
    return Sign(
        f"no group has different rewards (their mean is {values['reward']:.3g}), so nothing was learned",
        f"{mostly_cut(metrics.groups).strip()} If this continues, the prompts are too hard or too easy, or the reward "
        f"does not see the answers; {SAMPLE_MORE}.".strip(),
    )


def no_signal(past: PastSteps, metrics: StepMetrics, terms: AlarmTerms) -> Sign | None:
    """Raised if `alarms.without_signal` steps in a row had no signal, unless the prompts are solved."""
    steps = terms.alarms.without_signal
    counts = past.last("steps_without_signal", len(past.recent))
    if len(past.recent) == metrics.step:  # the history has all steps of the run, and the count starts at 0
        counts = [0.0, *counts]
    if steps is None or len(counts) <= steps or counts[-1] - counts[-1 - steps] < steps:
        return None
    learned = metrics.values["steps_without_signal"] < metrics.step
    if learned and (past.mean("solved_all", steps) or 0.0) >= SOLVED:
        return None
    equal = past.mean("frac_reward_zero_std", steps)
    if equal is not None and equal < 1:
        return _nothing_counts(steps, terms)
    reward = past.mean("reward", steps)
    mean = "" if reward is None else f" (the mean reward is {reward:.3g})"
    return Sign(
        f"{steps} steps in a row had no signal: no group has different rewards{mean}, so the weights do not change",
        "Read the completions, and try the reward on them (grpo rewards test, grpo rewards score). Use prompts that "
        f"are neither too hard nor too easy (data.curriculum, rollout.dynamic_sampling); {SAMPLE_MORE}.",
    )


def _nothing_counts(steps: int, terms: AlarmTerms) -> Sign:
    """The sign for rewards that differ although all gradients were 0."""
    masked = terms.loss.mask_truncated_completions
    advice = (
        "loss.mask_truncated_completions excludes truncated completions: raise rollout.max_completion_length, or set "
        "it to false."
        if masked
        else "Look at the advantages of the completions, and at the settings of the section loss."
    )
    return Sign(
        f"{steps} steps in a row had no signal: rewards differ, but the gradient was exactly 0, so the weights do not "
        "change",
        f"No completion in the loss has an advantage. {advice}",
    )


def why_none(
    weights: Mapping[str, float], environments: Collection[str], failed: bool, groups: Sequence[Group] = ()
) -> str:
    """A message on why no completion of `groups` has a score, and what to do."""
    used = [name for name, weight in weights.items() if weight] or list(weights)
    functions, own = ([name for name in used if (name in environments) == of_them] for of_them in (False, True))
    said = []
    if functions:
        said.append(
            f"{listed(functions)} {'failed or ' if failed else ''}returned None for each of them. None means that a "
            "reward does not apply: check that the data has what the reward reads (grpo rewards test, grpo rewards "
            "score)"
        )
    if own:
        said.append(f"{'some conversations failed, and ' if failed else ''}{unrewarded(own, groups)}")
    return ". ".join(said)


def listed(names: Sequence[str]) -> str:
    """Names as a list in a sentence: `a, b and c`."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _taught(metrics: StepMetrics) -> bool:
    """Whether a teacher provides a signal for the step's tokens."""
    return any(rollout.taught for group in metrics.groups for rollout in group.rollouts)
