"""What a run says of itself where it cannot be learning: better after its first step than after its last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from grpo.config import Recipe
from grpo.runs.state import RunState
from grpo.types import StepMetrics

MOSTLY = 0.5
"""Share of truncated completions in a step above which it is said."""
SAMPLE_MORE = "more rollout.num_generations or a higher rollout.temperature make rewards differ more often"


def warnings_of_first(metrics: StepMetrics, cfg: Recipe) -> list[str]:
    """What the first step says about a run that may learn nothing, each with what to do."""
    values = metrics.values
    return [*_of_lengths(values.get("completions/clipped_ratio", 0.0), cfg), *_of_rewards(values, cfg)]


def trained_on_nothing(state: RunState, cfg: Recipe) -> str | None:
    """What to say of a run none of whose updates was applied; None of others, and of one without a step."""
    if state.step == 0 or _updates(state) > 0:
        return None
    what = f"nothing was trained in {state.step} steps: "
    if state.trainer.counts.get("steps_without_signal", 0) < state.step:
        return f"{what}every update was skipped as not finite, or had no signal; not_finite/ holds what led to it"
    cut = ", or loss.mask_truncated_completions left them out" if cfg.loss.mask_truncated_completions else ""
    return (
        f"{what}in none of them did the rewards of a group of completions differ{cut}. "
        f"Look at the completions and try the reward on them (grpo rewards test, grpo rewards score); {SAMPLE_MORE}"
    )


def _updates(state: RunState) -> int:
    """How many updates were applied, as the optimizer has counted them."""
    return int(cast(int, state.trainer.arrays["optimizer"]["step"].item()))


def _of_lengths(truncated: float, cfg: Recipe) -> list[str]:
    if truncated <= MOSTLY:
        return []
    limit = cfg.rollout.max_completion_length
    return [
        f"step 1: {truncated:.0%} of the completions were cut off at rollout.max_completion_length ({limit:,} tokens), "
        "mostly before their answer: raise it, or ask for shorter answers in the prompt"
    ]


def _of_rewards(values: Mapping[str, float], cfg: Recipe) -> list[str]:
    if "reward" not in values:
        names = ", ".join(reward.name or reward.use for reward in cfg.rewards)
        return [f"step 1: no completion has a reward, so nothing was learned: every one of {names} gave none"]
    if values["frac_reward_zero_std"] < 1:
        return []
    return [
        f"step 1: in no group do the rewards differ (their mean is {values['reward']:.3g}), so nothing was learned. If "
        f"that goes on, the prompts are too hard or too easy, or the reward does not see the answers; {SAMPLE_MORE}"
    ]
