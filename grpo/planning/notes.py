"""Notes in the plan on settings that have no effect in this run, or that work badly together."""

from __future__ import annotations

from collections.abc import Iterator

from grpo.config import AdapterConfig, LossConfig, OptimConfig, RolloutConfig

OF_RATIOS = ("epsilon", "epsilon_high", "delta", "off_policy_mask_threshold")
OF_SAMPLERS = ("epsilon", "epsilon_high")
"""What dppo reads of a ratio to the sampler, which is not 1 even in the first update."""
RESHAPING = ("top_k", "top_p", "min_p", "repetition_penalty", "min_completion_length")
"""The settings of `rollout` that change the distribution that tokens are drawn from."""


def notes_on(
    optim: OptimConfig, rollout: RolloutConfig, adapter: AdapterConfig, loss: LossConfig, lags: bool = False
) -> Iterator[str]:
    """A line for each setting that will do less than it says, or other than it should. `lags`: completions come from
    the policy of the step before (`ranks`)."""
    every = adapter.sync_reference_every
    steps = "1 step" if optim.steps == 1 else f"{optim.steps} steps"
    if optim.warmup < optim.warmup_steps:
        yield f"optim.warmup_steps: cut from {optim.warmup_steps} to {optim.warmup}, because the run has {steps}"
    if every is not None and every >= optim.steps:
        yield f"adapter.sync_reference_every: {every} does nothing: the run has {steps}, so the reference stays"
    if rollout.reuse and optim.steps == 1:
        yield f"rollout.reuse: {rollout.reuse} does nothing: the run has 1 step, and no group is older"
    if adapter.dropout > 0 and loss.use is None and loss.preset.surrogate == "vespo":
        yield (
            "adapter.dropout with loss.type: vespo: its weight depends on the product of a completion's ratios, to "
            "which every token adds dropout noise. With 1 nat of noise per completion, weights shrink to 0.7 "
            "(advantage above 0) and 0.5 (below) on average, and more for longer completions: dapo or gspo tolerate "
            "dropout better"
        )
    updates = optim.num_iterations * optim.num_minibatches
    of_ratios = [name for name in OF_RATIOS if loss.preset.surrogate != "dppo" or name not in OF_SAMPLERS]
    if (
        updates == 1
        and adapter.dropout == 0
        and not rollout.reuse
        and not lags
        and loss.use is None
        and (unread := [f"loss.{name}" for name in of_ratios if name in loss.changed])
    ):
        yield (
            f"each rollout has one update, whose ratios are 1: {', '.join(unread)} have an effect only with "
            "optim.num_iterations or optim.num_minibatches above 1"
        )


def layers_note(optim: OptimConfig, layers: int) -> str | None:
    """A note if `optim.gradient_checkpointing` is more than the model's number of layers; else None."""
    number = optim.gradient_checkpointing
    if isinstance(number, bool) or not isinstance(number, int) or number <= layers:
        return None
    return (
        f"optim.gradient_checkpointing: {number} is more than this model's {layers} layers: all layers are checkpointed"
    )


def filter_note(loss: LossConfig, rollout: RolloutConfig) -> str:
    """What sampling from a filtered or penalised distribution means for a loss."""
    named = [
        f"rollout.{name}" for name in RESHAPING if getattr(rollout, name) != RolloutConfig.model_fields[name].default
    ]
    sampled = f"sampling settings ({', '.join(named)}) change the distribution that completions are sampled from"
    if loss.use is None and loss.preset.surrogate == "dppo":
        return f"{sampled}; dppo's ratio is relative to that distribution"
    if loss.importance_sampling_correction != "none":
        return f"{sampled}; loss.importance_sampling_correction corrects for the difference"
    return (
        f"{sampled}, but ratios compare the policy's own probabilities; loss.importance_sampling_correction (for "
        "example token_truncate) would correct for the difference"
    )
