"""The section `alarms`: from where on a run is said to go wrong."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from grpo.config.section import Above0, Fraction, Positive, Section


class AlarmsConfig(Section):
    truncated: Fraction | None = 0.5
    """More than this fraction of the completions reached `rollout.max_completion_length`: in the first step, or in the
    mean of the last 5. null switches an alarm off, here and below."""
    without_signal: Positive | None = 10
    """So many steps in a row had nothing to learn from: in no group did the rewards differ. A run that came to solve
    its prompts is left alone."""
    entropy: Fraction | None = 0.1
    """Entropy, in the mean of the last 10 steps, is below this fraction of the mean of the first 5, while most groups
    have equal rewards and most of these are not solved."""
    kl: Above0 | None = 2.0
    """`kl`, in nats a token, is above this."""
    grad_norm: Annotated[float, Field(ge=1, le=1e6)] | None = 50.0
    """The gradient's norm before clipping, in the median of the last 3 steps, is above so many times the median of the
    20 steps before. An update that was skipped because it was not finite counts as well."""
    eval_drop: Above0 | None = 1.0
    """The evaluation fell below its best value by more than so many times the half-widths of both 95 % intervals (1:
    the intervals do not overlap), while the training reward rose."""
    length_correlation: Fraction | None = 0.97
    """The correlation of reward and length among the completions of a prompt, over the last 10 steps, is at least this,
    or at most its negative."""
    logp_difference: Annotated[float, Field(ge=1, le=1e6)] | None = 3.0
    """The sampler's logprobs differ from the trainer's, in a step's mean, by this many times what rounding explains.
    `optim.max_logp_difference` says from where on the run stops."""
    effective_sample_size: Fraction | None = 0.3
    """The importance ratios of trainer and sampler are so uneven that less than this fraction of the tokens is worth
    anything, in the mean of the last 5 steps."""
    failed_rewards: Fraction | None = 0.05
    """A reward, or an environment, failed on more than this fraction of the completions of the last 10 steps.
    `rewards.0.max_failure_rate` says from where on the run stops."""
    failed_calls: Fraction | None = 0.5
    """More than this fraction of the calls of tools failed: in the first step, or in the mean of the last 5."""
