"""Alarms about rewards without a learning signal: no rewards, or equal rewards."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

from grpo.alarms.past import WITHOUT_ADVANTAGE, PastSteps, known
from grpo.alarms.terms import AlarmTerms, Sign
from grpo.scoring.own import mostly_cut, unrewarded
from grpo.types import FAILURES, Group, StepMetrics

COUNT = "steps_without_signal"
SAMPLE_MORE = "more rollout.num_generations or a higher rollout.temperature make rewards differ more often"
CONSTANT = (
    "Either the reward does not read the completions, or it finds no difference between them: read some, and try the "
    "reward on them (grpo rewards test, grpo rewards score)."
)
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
    if (same := _same_reward(metrics)) is not None:
        return Sign(f"every completion got the reward {same:.3g}, so nothing was learned", CONSTANT)
    return Sign(
        f"no group has different rewards (their mean is {values['reward']:.3g}), so nothing was learned",
        f"{mostly_cut(metrics.groups).strip()} If this continues, the prompts are too hard or too easy, or the reward "
        f"does not see the answers; {SAMPLE_MORE}.".strip(),
    )


def _same_reward(metrics: StepMetrics) -> float | None:
    """The reward that all completions of the step have. None for 0 and 1, because all may be wrong or right, and if
    most completions were cut, which makes rewards equal, too."""
    found = {rollout.reward for group in metrics.groups for rollout in group.rollouts}
    cut = metrics.values.get("completions/clipped_ratio", 0.0) > 0.5 or mostly_cut(metrics.groups)
    reward = found.pop() if len(found) == 1 and not cut else None
    return None if reward in (0.0, 1.0) else reward


def no_signal(past: PastSteps, metrics: StepMetrics, terms: AlarmTerms) -> Sign | None:
    """Raised if `alarms.without_signal` steps in a row had no signal, unless the prompts are solved."""
    steps = terms.alarms.without_signal
    if steps is None or not _all_silent(past, metrics.step, steps, by_advantages=terms.loss.use is None):
        return None
    if _has_learned(past, metrics) and (past.mean("solved_all", steps) or 0.0) >= SOLVED:
        return None
    counts = past.last(COUNT, steps)
    moved = len(counts) == steps and counts[-1] - counts[0] < steps - 1
    weights = "only terms of the loss without advantages move the weights" if moved else "the weights do not change"
    equal = past.mean("frac_reward_zero_std", steps)
    if equal is not None and equal < 1:
        return _nothing_counts(steps, weights, moved, terms)
    if (same := _same_reward(metrics)) is not None:
        return Sign(
            f"{steps} steps in a row had no signal: every completion got the reward {same:.3g}, so {weights}", CONSTANT
        )
    reward = past.mean("reward", steps)
    mean = "" if reward is None else f" (the mean reward is {reward:.3g})"
    return Sign(
        f"{steps} steps in a row had no signal: no group has different rewards{mean}, so {weights}",
        "Read the completions, and try the reward on them (grpo rewards test, grpo rewards score). Use prompts that "
        f"are neither too hard nor too easy (data.curriculum, rollout.dynamic_sampling); {SAMPLE_MORE}.",
    )


def _all_silent(past: PastSteps, step: int, steps: int, by_advantages: bool) -> bool:
    """Whether the last `steps` steps had a gradient of 0 or, `by_advantages`, no completion with an advantage: a KL
    penalty or an entropy bonus has a gradient all the same. A loss of the user's own may need no advantages."""
    known_steps = [{COUNT: 0.0}, *past.recent] if len(past.recent) == step else past.recent  # or some are forgotten
    pairs = list(pairwise(known_steps))[-steps:]
    return len(pairs) == steps and all(
        (by_advantages and now.get(WITHOUT_ADVANTAGE)) or (COUNT in before and now.get(COUNT, 0.0) > before[COUNT])
        for before, now in pairs
    )


def _has_learned(past: PastSteps, metrics: StepMetrics) -> bool:
    """Whether any step had a signal. Where the count does not say so (a KL penalty has a gradient), the steps at both
    ends of the run do: one had an advantage, or the reward has changed between them."""
    if metrics.values.get(COUNT, 0.0) >= metrics.step:
        return False
    ends = (*past.first, *past.recent)
    rewards = [known(some, "reward") for some in (past.first, past.recent)]
    return not all(numbers.get(WITHOUT_ADVANTAGE) for numbers in ends) or rewards[0][:1] != rewards[1][-1:]


def _nothing_counts(steps: int, weights: str, moved: bool, terms: AlarmTerms) -> Sign:
    """Rewards differ, and yet no completion that is learned from has an advantage."""
    masked = terms.loss.mask_truncated_completions
    advice = (
        "loss.mask_truncated_completions excludes truncated completions: raise rollout.max_completion_length, or set "
        "it to false."
        if masked
        else "Look at the advantages of the completions, and at the settings of the section loss."
    )
    why = "no completion has an advantage" if moved else "the gradient was exactly 0"
    return Sign(
        f"{steps} steps in a row had no signal: rewards differ, but {why}, so {weights}",
        f"No completion that is learned from has an advantage. {advice}",
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
