"""What a run says of itself: after its first step where it cannot be learning, after its last where it has not learned.

A run that trained on nothing ends with exit code 1: it did not do what it was asked. A run that made the model worse
did, and its numbers are a result (a sweep over learning rates may want just that), so it ends with 0 and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from grpo.config import LossConfig, Recipe, RewardConfig, RolloutConfig
from grpo.evaluation.evaluator import wilson_interval
from grpo.runs.state import RunState
from grpo.types import EvalMetrics, StepMetrics

MOSTLY = 0.5
"""Share of truncated completions in a step above which it is said."""
FEW = 20
"""Prompts below which the bootstrap's interval is not believed: it has no width where all values are equal."""
SAMPLE_MORE = "more rollout.num_generations or a higher rollout.temperature make rewards differ more often"


def warnings_of_first(metrics: StepMetrics, rollout: RolloutConfig, rewards: Sequence[RewardConfig]) -> list[str]:
    """What the first step says about a run that may learn nothing, each with what to do."""
    values = metrics.values
    return [*_of_lengths(values.get("completions/clipped_ratio", 0.0), rollout), *_of_rewards(values, rewards)]


def trained_on_nothing(state: RunState, loss: LossConfig, rewards: Sequence[RewardConfig]) -> str | None:
    """What to say of a run none of whose updates was applied; None of others, and of one without a step."""
    if state.step == 0 or _updates(state) > 0:
        return None
    what = f"nothing was trained in {state.step} steps: "
    if state.trainer.counts.get("steps_without_signal", 0) < state.step:
        return f"{what}every update was skipped as not finite, or had no signal; not_finite/ holds what led to it"
    if not state.rewarded:
        return (
            f"{what}no completion got a reward, because {_names(rewards)} answered None for it or failed. None means "
            "that a reward does not apply: see that the data has what it reads (grpo rewards test, grpo rewards score)"
        )
    cut = ", or loss.mask_truncated_completions left them out" if loss.mask_truncated_completions else ""
    return (
        f"{what}in none of them did the rewards of a group of completions differ{cut}. "
        f"Look at the completions and try the reward on them (grpo rewards test, grpo rewards score); {SAMPLE_MORE}"
    )


def made_worse(state: RunState, cfg: Recipe) -> str | None:
    """What to say of a run whose last evaluation is far below its first; None of others.

    By `checkpoint.metric_for_best_model`: its value must have fallen so far that the 95 % intervals of the two
    evaluations do not overlap, even if every grading that failed in the last one (which counts as not right) had been
    right. Without any change of the model that happens in less than one of 300 runs.
    """
    before, after = state.before, state.after
    if cfg.eval is None or before is None or after is None or after.step <= before.step:
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
    hold = "" if cfg.has_penalty else ", or hold the model to its start with loss.beta: 0.01"
    return (
        f"this run made the model worse: eval/{name} from {told[0]} to {told[1]}, 95 % intervals. Try a lower "
        f"optim.learning_rate than {cfg.optim.learning_rate:g}{hold}, and read the last completions{kept}"
    )


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


def _names(rewards: Sequence[RewardConfig]) -> str:
    """The rewards of a recipe in a sentence."""
    *others, last = [reward.name or reward.use.rpartition("/")[2] for reward in rewards]
    return f"{', '.join(others)} and {last}" if others else last


def _updates(state: RunState) -> int:
    """How many updates were applied, as the optimizer has counted them."""
    return int(cast(int, state.trainer.arrays["optimizer"]["step"].item()))


def _of_lengths(truncated: float, rollout: RolloutConfig) -> list[str]:
    if truncated <= MOSTLY:
        return []
    limit = rollout.max_completion_length
    return [
        f"step 1: {truncated:.0%} of the completions were cut off at rollout.max_completion_length ({limit:,} tokens), "
        "mostly before their answer: raise it, or ask for shorter answers in the prompt"
    ]


def _of_rewards(values: Mapping[str, float], rewards: Sequence[RewardConfig]) -> list[str]:
    if "reward" not in values:
        return [f"step 1: no completion has a reward, so nothing was learned: every one of {_names(rewards)} gave none"]
    if values["frac_reward_zero_std"] < 1:
        return []
    return [
        f"step 1: in no group do the rewards differ (their mean is {values['reward']:.3g}), so nothing was learned. If "
        f"that goes on, the prompts are too hard or too easy, or the reward does not see the answers; {SAMPLE_MORE}"
    ]
