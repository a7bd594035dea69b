"""Notes in the plan on settings that have no effect in this run, or that work badly together."""

from __future__ import annotations

from collections.abc import Iterator

from grpo.config import AdapterConfig, LossConfig, OptimConfig, RolloutConfig

OF_RATIOS = ("epsilon", "epsilon_high", "delta", "off_policy_mask_threshold")
OF_SAMPLERS = ("epsilon", "epsilon_high")
"""Settings that dppo applies to ratios to the sampler, which differ from 1 even in the first update."""


def notes_on(optim: OptimConfig, rollout: RolloutConfig, adapter: AdapterConfig, loss: LossConfig) -> Iterator[str]:
    """Yield a note for each setting that has less effect than it seems, or an undesired effect."""
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


def filter_note(loss: LossConfig) -> str:
    """A note on what sampling from a filtered or penalized distribution means for the loss."""
    sampled = "sampling settings such as rollout.top_k change the distribution that completions are sampled from"
    if loss.use is None and loss.preset.surrogate == "dppo":
        return f"{sampled}; dppo's ratio is relative to that distribution"
    if loss.importance_sampling_correction != "none":
        return f"{sampled}; loss.importance_sampling_correction corrects for the difference"
    return (
        f"{sampled}, but ratios compare the policy's own probabilities; loss.importance_sampling_correction (for "
        "example token_truncate) would correct for the difference"
    )
