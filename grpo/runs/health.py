"""What a run says of itself: after its first step where it cannot be learning, after its last where it has not learned.

A run that trained on nothing ends with exit code 1: it did not do what it was asked. A run that made the model worse
did, and its numbers are a result (a sweep over learning rates may want just that), so it ends with 0 and says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, cast

from grpo.config import DataConfig, LossConfig, Recipe, RolloutConfig
from grpo.environments.failedcalls import first_failed
from grpo.evaluation.evaluator import wilson_interval
from grpo.runs.state import RunState
from grpo.scoring.own import mostly_cut, unrewarded
from grpo.scoring.text import counted
from grpo.types import FAILURES, EvalMetrics, Group, StepMetrics

MOSTLY = 0.5
"""Share of truncated completions in a step above which it is said."""
FEW = 20
"""Prompts below which the bootstrap's interval is not believed: it has no width where all values are equal."""
SHORTEST = 5
"""Steps at each end of a run without `eval` whose rewards are compared, at least."""
FIRST = 3.5
"""Standard errors that the first step's mean may be off: it is one sample, and its groups are few."""
STUDENT = 2.776
"""The 97.5 % quantile of Student's t with 4 degrees of freedom."""
LONGEST = 300
"""Characters of an error that are shown."""
SAMPLE_MORE = "more rollout.num_generations or a higher rollout.temperature make rewards differ more often"


def warnings_of_first(
    metrics: StepMetrics, rollout: RolloutConfig, weights: Mapping[str, float], environments: Collection[str] = ()
) -> list[str]:
    """What the first step says about a run that may learn nothing, each with what to do.

    `weights` are those of the rewards by name, environments' own included, and `environments` the names of these, here
    and below.
    """
    return [*_of_lengths(metrics, rollout), *_of_tools(metrics), *_of_rewards(metrics, weights, environments)]


def trained_on_nothing(
    state: RunState, loss: LossConfig, weights: Mapping[str, float], environments: Collection[str] = ()
) -> str | None:
    """What to say of a run none of whose updates was applied; None of others, and of one without a step."""
    if state.step == 0 or _updates(state) > 0:
        return None
    what = f"nothing was trained in {counted(state.step, 'step')}: "
    if state.trainer.counts.get("steps_without_signal", 0) < state.step:
        return f"{what}every update was skipped as not finite, or had no signal; not_finite/ holds what led to it"
    if not state.rewarded:
        return f"{what}no completion got a reward: {_why_none(weights, environments, _has_failed(state))}"
    cut = ", or loss.mask_truncated_completions left them out" if loss.mask_truncated_completions else ""
    return (
        f"{what}in no group of completions did the rewards differ{cut}. "
        f"Look at the completions and try the reward on them (grpo rewards test, grpo rewards score); {SAMPLE_MORE}"
    )


def made_worse(state: RunState, cfg: Recipe) -> str | None:
    """What to say of a run whose last evaluation is far below its first; None of others. A run without `eval` is judged
    by its training rewards (`_reward_fell`).

    By `checkpoint.metric_for_best_model`: its value must have fallen so far that the 95 % intervals of the two
    evaluations do not overlap, even if every grading that failed in the last one (which counts as not right) had been
    right. Without any change of the model that happens in less than one of 300 runs.
    """
    before, after = state.before, state.after
    if cfg.eval is None:
        return _reward_fell(state.rewards, state.start, cfg)
    if before is None or after is None or after.step <= before.step:
        return None
    name = cfg.best_metric
    if before.grader != after.grader or not {name} <= before.values.keys() & after.values.keys():
        return None
    low, high = _interval(before, name), _interval(after, name)
    if low is None or high is None or high[1] + after.failed_gradings / after.n >= low[0]:
        return None
    told = [f"{_told(made, name)} ({_told(made, name, 0)} to {_told(made, name, 1)})" for made in (before, after)]
    best = state.best
    kept = (
        f"; checkpoint {best.step} was the best (grpo export RUN --checkpoint best)"
        if best is not None and best.value >= before.values[name]
        else ""
    )
    return (
        f"this run made the model worse: eval/{name} from {told[0]} to {told[1]}, 95 % intervals. {_advice(cfg)}{kept}"
    )


def _reward_fell(rewards: Sequence[float], start: float | None, cfg: Recipe) -> str | None:
    """What to say of a run whose mean training reward fell; None of others, and where that cannot be told.

    The first fifth of the steps is compared with the last, at least 5 steps each: Student's 95 % intervals of their
    means must not overlap. A model that breaks within the first steps spreads their rewards, so the last fifth is also
    compared with `start`, the lower end for the first step alone. Where later steps may have harder tasks, nothing
    follows from a lower reward.
    """
    part = max(SHORTEST, len(rewards) // 5)
    if len(rewards) < 2 * part or not all(map(_alike, cfg.data.parts.values())):
        return None
    first, last = rewards[:part], rewards[-part:]
    (before, off), (after, also_off) = ((fmean(part_), _half_width(part_)) for part_ in (first, last))
    if after + also_off < before - off:
        fell = f"{before:.3f} ± {off:.3f} (95 %) in the first {part} steps"
    elif start is not None and after + also_off < start:
        fell = f"{rewards[0]:.3f} (at least {start:.3f}) in the first step"
    else:
        return None
    return (
        f"this run made the model worse: the mean reward fell from {fell} "
        f"to {after:.3f} ± {also_off:.3f} (95 %) in the last {part}. {_advice(cfg)}. An eval section would "
        "measure it on held-out prompts, and keep the best checkpoint"
    )


def _alike(data: DataConfig) -> bool:
    """Whether early and late steps have tasks that are as hard on average: not where rows come in their own order, and
    not where they are drawn by what became of them, so that what is solved comes up less and less."""
    return data.shuffle and data.curriculum is None and data.sampler is None


def lowest_mean(groups: Sequence[Group]) -> float | None:
    """The lower end of an interval of a step's mean reward, from the means of its groups; None of fewer than 5.

    It is 3.5 standard errors below the mean: under noise alone a last fifth of 5 steps is below that in fewer than one
    of 200 runs (simulated, for normal rewards and 5 groups or more).
    """
    rewards_G = [[rollout.reward for rollout in group.rollouts if rollout.reward is not None] for group in groups]
    means = [fmean(rewards) for rewards in rewards_G if rewards]
    return fmean(means) - FIRST * stdev(means) / math.sqrt(len(means)) if len(means) >= SHORTEST else None


def _half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean, at least as wide as Student's for five or more values."""
    return STUDENT * stdev(values) / math.sqrt(len(values))


def _advice(cfg: Recipe) -> str:
    """What to try where a run made the model worse."""
    hold = "" if cfg.has_penalty else ", or hold the model to its start with loss.beta: 0.01"
    return f"Try a lower optim.learning_rate than {cfg.optim.learning_rate:g}{hold}, and read the last completions"


def _interval(metrics: EvalMetrics, name: str) -> tuple[float, float] | None:
    """A metric's 95 % interval, at least as wide as Wilson's where it is a fraction; None where it says too little."""
    low, high = metrics.intervals[name]
    if name.startswith("rewards/"):
        return (low, high) if metrics.n >= FEW else None
    least, most = wilson_interval(metrics.values[name] * metrics.n, metrics.n)
    return min(low, least), max(high, most)


def _told(metrics: EvalMetrics, name: str, end: int | None = None) -> str:
    """A metric's value, or an end of its interval, as text."""
    value = metrics.values[name] if end is None else metrics.intervals[name][end]
    return f"{value:.3f}" if name.startswith("rewards/") else f"{value:.1%}"


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _has_failed(state: RunState) -> bool:
    """Whether a reward has failed on a completion, as the scorer has counted it."""
    records = cast(Mapping[str, Any], state.trainer.counts.get("scorer", {})).get("records", {})
    return any(record["failures"] for record in records.values())


def _updates(state: RunState) -> int:
    """How many updates were applied, as the optimizer has counted them."""
    return int(cast(int, state.trainer.arrays["optimizer"]["step"].item()))


def _of_lengths(metrics: StepMetrics, rollout: RolloutConfig) -> list[str]:
    truncated = metrics.values.get("completions/clipped_ratio", 0.0)
    if truncated <= MOSTLY:
        return []
    limit = rollout.max_completion_length
    added = any(not all(one.trajectory.trained) for group in metrics.groups for one in group.rollouts)
    room = " (tokens that the environment adds take up room, too)" if added else ""
    return [
        f"step 1: {truncated:.0%} of the completions were cut off at rollout.max_completion_length ({limit:,} tokens)"
        f"{room}, mostly before their answer: raise it, or ask for shorter answers in the prompt"
    ]


def _of_tools(metrics: StepMetrics) -> list[str]:
    talks = [rollout.trajectory.conversation for group in metrics.groups for rollout in group.rollouts]
    calls, failed = (sum(getattr(talk, name) for talk in talks if talk) for name in ("calls", "failed_calls"))
    first = first_failed(metrics.groups)
    if first is None or failed <= MOSTLY * calls:
        return []
    tool, error = first[0], " ".join(first[1].split())[:LONGEST].rstrip(".")
    return [
        f"step 1: {failed:,} of {calls:,} calls of tools failed, the first of them of {tool!r}: {error}. The "
        "model is shown such errors as results, and goes on. If the tool should not fail so, stop the run and mend it"
    ]


def _why_none(
    weights: Mapping[str, float], environments: Collection[str], failed: bool, groups: Sequence[Group] = ()
) -> str:
    """What the rewards did that gave no score to any completion (of `groups`), and what to do."""
    used = [name for name, weight in weights.items() if weight] or list(weights)
    functions, own = ([name for name in used if (name in environments) == of_them] for of_them in (False, True))
    said = []
    if functions:
        said.append(
            f"{_listed(functions)} {'failed or ' if failed else ''}returned None for each of them. None means that a "
            "reward does not apply: see that the data has what it reads (grpo rewards test, grpo rewards score)"
        )
    if own:
        said.append(f"{'some conversations failed, and ' if failed else ''}{unrewarded(own, groups)}")
    return ". ".join(said)


def _of_rewards(metrics: StepMetrics, weights: Mapping[str, float], environments: Collection[str]) -> list[str]:
    values = metrics.values
    taught = any(rollout.taught for group in metrics.groups for rollout in group.rollouts)
    if taught and ("reward" in values or not any(weights.values())):
        return []  # a teacher gives every token something to learn
    if "reward" not in values:
        rates = tuple(f"/{kind}_rate" for kind in FAILURES)
        failed = any(value for name, value in values.items() if name.endswith(rates))
        why = _why_none(weights, environments, failed, metrics.groups)
        learned = "only the teacher was learned from" if taught else "nothing was learned"
        return [f"step 1: no completion has a reward, so {learned}. {why}"]
    advantages = any(rollout.has_advantage for group in metrics.groups for rollout in group.rollouts)
    if values["frac_reward_zero_std"] < 1 or advantages:  # of turns, or by a penalty
        return []
    return [
        f"step 1: in no group do the rewards differ (their mean is {values['reward']:.3g}), so nothing was learned."
        f"{mostly_cut(metrics.groups)} If that goes on, the prompts are too hard or too easy, or the reward does not "
        f"see the answers; {SAMPLE_MORE}"
    ]
