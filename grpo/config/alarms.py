"""The section `alarms`: when a run reports that it is going wrong."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from grpo.config.section import Above0, Fraction, Section


class AlarmsConfig(Section):
    truncated: Fraction | None = 0.5
    """Report truncated completions: more than this fraction of the completions reach `rollout.max_completion_length`,
    in the first step or on average over the last 5 steps. null turns the alarm off, as for every alarm in this
    section."""
    without_signal: Annotated[int, Field(ge=1, le=24)] | None = 10
    """Report this many steps in a row without a signal: no completion has an advantage, or the gradient is exactly 0.
    The alarm stays silent if the run has learned to solve its prompts."""
    entropy: Fraction | None = 0.1
    """Report an entropy collapse: the mean entropy of the last 10 steps is below this fraction of the mean of the first
    5 steps, most groups have equal rewards, and most of these groups are not solved."""
    kl: Above0 | None = 2.0
    """Report that `kl` is above this many nats per token."""
    grad_norm: Annotated[float, Field(ge=1, le=1e6)] | None = 50.0
    """Report a gradient explosion: the median gradient norm of the last 3 steps, before clipping, is above this many
    times the median of the 20 steps before them. The alarm also reports an update that was skipped because it was not
    finite."""
    eval_drop: Above0 | None = 1.0
    """Report that the evaluation fell while the training reward rose. The fall from the best evaluation is measured in
    units of the two 95 % intervals' half-widths, added together: at 1, the intervals no longer overlap."""
    length_correlation: Fraction | None = 0.97
    """Report that the reward follows length alone: the correlation of reward and length within prompts, over the last
    10 steps, is at least this value, positive or negative."""
    logp_difference: Annotated[float, Field(ge=1, le=1e6)] | None = 3.0
    """Report that sampler and trainer disagree: the mean difference between their logprobs in a step is at least this
    many times the difference that rounding explains. `optim.max_logp_difference` stops the run. With `ranks`, both look
    only at steps whose completions come from the current policy, usually the first step: later logprobs are of two
    policies."""
    effective_sample_size: Fraction | None = 0.3
    """Report that the importance ratios of trainer and sampler are uneven: the mean of `sampling/effective_sample_size`
    over the last 5 steps is below this value."""
    failed_rewards: Fraction | None = 0.05
    """Report a reward or an environment that fails or times out on more than this fraction of the completions of the
    last 10 steps. `rewards.0.max_failure_rate` stops the run. This alarm and `failed_calls` are reported again if the
    failures stop and return, at least 25 steps after the last report."""
    failed_calls: Fraction | None = 0.5
    """Report that more than this fraction of the tool calls fail, in the first step or on average over the last 5
    steps."""
