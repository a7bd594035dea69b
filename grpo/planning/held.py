"""What a run holds all the time, and while the optimizer steps: counted, not measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.config import AdapterConfig, OptimConfig
from grpo.model.fsdp import Spread
from grpo.model.widehead import bytes_at_work
from grpo.training.optimizer import Float32Optimizer, bytes_of_a_group
from grpo.training.update import bytes_of_a_norm

FORMER = "the state before the step"
"""Held from a step's first update on; counted among what stays, though a rollout does not have it beside it."""


@dataclass(frozen=True, slots=True)
class Held:
    """What does not depend on lengths. It is counted once, though many lengths are planned to find the longest.

    Numbers of parameters (`trained`, and `parameters` without an adapter's), and bytes: what `stays`, what is held
    while the optimizer is at its `step`, and what a widened `head` holds at work. Where weights are spread over
    processes, what stays are parts; `whole` is what they take beside that while they are whole, and `saved` what an
    array of the optimizer's takes beside them while a checkpoint is written: joined, and in its shape.
    """

    parameters: int
    trained: int
    stays: dict[str, int]
    step: int
    head: int
    quantized: bool
    whole: int = 0
    saved: int = 0

    @classmethod
    def of(cls, optim: OptimConfig, adapter: AdapterConfig, model: nn.Module, states: int, gpu: bool) -> Held:
        """Counted by the shapes of a model's arrays. `states` are the adapter's besides the policy."""
        trained: int = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
        stays = what_stays(optim, adapter, model, states)
        return cls(
            parameters=count_weights(model) - (trained if adapter.type != "full" else 0),
            trained=trained,
            stays=stays,
            step=optimizer_step(optim, adapter, model, stays["optimizer"], gpu),
            head=bytes_at_work(model, gpu),
            quantized=any(hasattr(module, "bits") for module in model.modules()),
        )


def held_spread(optim: OptimConfig, adapter: AdapterConfig, spread: Spread, states: int, gpu: bool) -> Held:
    """The same where weights are spread."""
    whole = Held.of(optim, adapter, spread.model, states, gpu)
    with spread.rehearsing():
        parts = Held.of(optim, adapter, spread.model, states, gpu)
    more = {name: whole.stays[name] - size for name, size in parts.stays.items()}
    return replace(
        parts,
        parameters=whole.parameters,
        trained=whole.trained,
        head=whole.head,
        quantized=whole.quantized,
        whole=more["weights"] + more["other states"],
        saved=2 * 4 * max((place.size for place in spread.shards.places.values()), default=0),
    )


def what_stays(optim: OptimConfig, adapter: AdapterConfig, model: nn.Module, states: int) -> dict[str, int]:
    """Bytes that are held all the time, by what they are for."""
    trained = model.trainable_parameters()
    optimizer = _bytes(Float32Optimizer(optim, trained).state)  # nothing of it is computed
    several = _holds_former(adapter) and _several(optim)
    return {
        "weights": _bytes(model.parameters()),
        "optimizer": optimizer,
        "other states": states * _bytes(trained),
        FORMER: several * (_bytes(trained) + optimizer),
    }


def _holds_former(adapter: AdapterConfig) -> bool:
    """Whether the arrays of before a step are held until it is done, as `Trainer.wholly` does."""
    return adapter.type != "full"


def _several(optim: OptimConfig) -> bool:
    """Whether a step has more than one update."""
    return optim.num_iterations * optim.num_minibatches > 1


def optimizer_step(optim: OptimConfig, adapter: AdapterConfig, model: nn.Module, optimizer: int, gpu: bool) -> int:
    """Bytes beside what stays: the gradient, and a group at work, or before that what its norm is computed from.

    The state of an adapter before a step is held until the step is done: what the step makes takes the gradient's place
    beside it. (Of several updates that state is counted among what stays.) Whole weights are made in their own place.
    """
    trained = model.trainable_parameters()
    numbers: int = sum(array.size for _, array in tree_flatten(trained))
    made = _bytes(trained) + optimizer if _holds_former(adapter) and not _several(optim) else 0
    moving = max(4 * numbers, made) + bytes_of_a_group(optim, trained, gpu)
    return max(moving, 4 * numbers + bytes_of_a_norm(trained))


def _bytes(tree: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))


def count_weights(model: nn.Module) -> int:
    """How many parameters there are; of a quantised layer its weights, not the words that they are packed into."""
    count: int = sum(array.size for _, array in tree_flatten(model.parameters()))
    for module in model.modules():
        if hasattr(module, "bits"):
            scales = [module[name].size for name in ("scales", "biases") if name in module]
            count += module.weight.size * 32 // module.bits - module.weight.size - sum(scales)
    return count
