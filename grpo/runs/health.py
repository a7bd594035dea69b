"""What a run reports after its last step: that it has trained nothing, or made the model worse.

Alarms during training are in `grpo.alarms`.

A run that trained nothing ends with exit code 1, because it did not do what it was asked to do. A run that made the
model worse did train, and its numbers are a result (a sweep over learning rates may want just that), so it ends with 0
and a message.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, cast

from grpo.alarms.evaluation import interval_of
from grpo.alarms.signal import SAMPLE_MORE, why_none
from grpo.config import DataConfig, LossConfig, Recipe
from grpo.evaluation.evaluator import hidden_by_failures
from grpo.runs.state import RunState
from grpo.scoring.text import counted
from grpo.types import EvalMetrics, Group

SHORTEST = 5
"""Minimum number of steps at each end of a run without `eval` whose rewards are compared."""
FIRST = 3.5
"""Standard errors that the first step's mean may be off: it is a single sample of few groups."""
STUDENT = 2.776
"""The 97.5 % quantile of Student's t with 4 degrees of freedom."""


def trained_on_nothing(
    state: RunState, loss: LossConfig, weights: Mapping[str, float], environments: Collection[str] = ()
) -> str | None:
    """A message if the run applied no update; None if it applied one, or made no step.

    `weights` are the weights of the rewards by name, environments' own rewards included; `environments` are the names
    of the latter.
    """
    if state.step == 0 or _updates(state) > 0:
        return None
    what = f"nothing was trained in {counted(state.step, 'step')}: "
    if state.trainer.counts.get("steps_without_signal", 0) < state.step:
        return f"{what}every update was skipped because it was not finite or had no signal; not_finite/ has the batches"
    if not state.rewarded:
        return f"{what}no completion got a reward: {why_none(weights, environments, _has_failed(state))}"
    if "truncation" in state.past.told and not loss.mask_truncated_completions:
        return (
            f"{what}the rewards did not differ within any group of completions, and most completions were truncated "
            "at rollout.max_completion_length. Raise the limit, or ask for shorter answers in the prompt"
        )
    cut = ", or loss.mask_truncated_completions masked the completions" if loss.mask_truncated_completions else ""
    return (
        f"{what}the rewards did not differ within any group of completions{cut}. "
        f"Look at the completions and try the reward on them (grpo rewards test, grpo rewards score); {SAMPLE_MORE}"
    )


def made_worse(state: RunState, cfg: Recipe) -> str | None:
    """A message if the run's last evaluation is far below its first, else None. Without `eval`, the training rewards
    decide (`_reward_fell`).

    The metric is `checkpoint.metric_for_best_model`. Its value must have fallen so far that the 95 % intervals of the
    two evaluations do not overlap, even if every failed grading of the last evaluation (which counts as wrong) had been
    right. If the model does not change, this happens in fewer than one of 300 runs.
    """
    before, after = state.before, state.after
    if cfg.eval is None:
        return _reward_fell(state.rewards, state.start, cfg)
    if before is None or after is None or after.step <= before.step:
        return None
    name = cfg.best_metric
    if before.grader != after.grader or not {name} <= before.values.keys() & after.values.keys():
        return None
    low, high = interval_of(before, name), interval_of(after, name)
    if low is None or high is None or high[1] + hidden_by_failures(after, name) >= low[0]:
        return None
    shown = [f"{_shown(made, name)} ({_shown(made, name, 0)} to {_shown(made, name, 1)})" for made in (before, after)]
    best = state.best
    kept = (
        f"; checkpoint {best.step} was the best (grpo export RUN --checkpoint best)"
        if best is not None and best.value >= before.values[name]
        else ""
    )
    change = f"eval/{name} from {shown[0]} to {shown[1]}, 95 % intervals"
    return f"this run made the model worse: {change}. {_advice(cfg)}{kept}"


def _reward_fell(rewards: Sequence[float], start: float | None, cfg: Recipe) -> str | None:
    """A message if the run's mean training reward fell; None if it did not, or if the data do not allow a comparison.

    The first fifth of the steps is compared with the last fifth, at least 5 steps each: Student's 95 % intervals of
    their means must not overlap. A model that breaks within the first steps spreads their rewards, so the last fifth is
    also compared with `start`, the lower end of the interval of the first step alone. If later steps may have harder
    tasks, a lower reward proves nothing.
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
    """Whether tasks of early and late steps are equally hard on average.

    They are not if rows come in their own order, or if a curriculum or sampler may draw solved tasks less often.
    """
    return data.shuffle and data.curriculum is None and data.sampler is None


def lowest_mean(groups: Sequence[Group]) -> float | None:
    """The lower end of an interval of a step's mean reward, from the means of its groups; None for fewer than 5 groups.

    It is 3.5 standard errors below the mean. By noise alone, the mean of 5 last steps is below it in fewer than one of
    200 runs (simulated, for normal rewards and 5 groups or more).
    """
    rewards_G = [[rollout.reward for rollout in group.rollouts if rollout.reward is not None] for group in groups]
    means = [fmean(rewards) for rewards in rewards_G if rewards]
    return fmean(means) - FIRST * stdev(means) / math.sqrt(len(means)) if len(means) >= SHORTEST else None


def _half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean; for more than five values it is slightly too wide."""
    return STUDENT * stdev(values) / math.sqrt(len(values))


def _advice(cfg: Recipe) -> str:
    """What to try after a run that made the model worse."""
    hold = "" if cfg.has_penalty else ", or keep the model close to its start with loss.beta: 0.01"
    return f"Try a lower optim.learning_rate than {cfg.optim.learning_rate:g}{hold}, and read the last completions"


def _shown(metrics: EvalMetrics, name: str, end: int | None = None) -> str:
    """A metric's value, or an end of its interval, as text."""
    value = metrics.values[name] if end is None else metrics.intervals[name][end]
    return f"{value:.3f}" if name.startswith("rewards/") else f"{value:.1%}"


def _has_failed(state: RunState) -> bool:
    """Whether a reward has failed on a completion, by the scorer's counts."""
    records = cast(Mapping[str, Any], state.trainer.counts.get("scorer", {})).get("records", {})
    return any(record["failures"] for record in records.values())


def _updates(state: RunState) -> int:
    """The number of applied updates, by the optimizer's count."""
    return int(cast(int, state.trainer.arrays["optimizer"]["step"].item()))
