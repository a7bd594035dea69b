"""Memory that a run holds all the time, and during the optimizer's step: counted, not measured."""

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
"""In memory from a step's first update on. It counts as staying, although it does not exist during a rollout."""


@dataclass(frozen=True, slots=True)
class Held:
    """Memory that does not depend on lengths. It is counted once, although the search for the longest completion makes
    plans for many lengths.

    parameters  number of parameters, without an adapter's
    trained     number of trained parameters
    stays       bytes that stay in memory, by purpose; parts of the weights if they are spread over processes
    step        additional bytes during the optimizer's step
    head        bytes that a widened head needs while it computes
    quantized   whether the model is quantized
    whole       additional bytes while spread weights are whole
    saved       additional bytes while a checkpoint of spread weights is written: the largest array of the optimizer's
                state, joined, and in its shape
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
        """Count by the shapes of a model's arrays. `states` is the number of adapter states besides the policy."""
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
    """The same if weights are spread over processes."""
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
    """Bytes that stay in memory, by purpose."""
    trained = model.trainable_parameters()
    optimizer = _bytes(Float32Optimizer(optim, trained).state)  # only sizes: no array is computed
    several = _holds_former(adapter) and _several(optim)
    return {
        "weights": _bytes(model.parameters()),
        "optimizer": optimizer,
        "other states": states * _bytes(trained),
        FORMER: several * (_bytes(trained) + optimizer),
    }


def _holds_former(adapter: AdapterConfig) -> bool:
    """Whether the arrays from before a step are kept until it is done (`Trainer.wholly`)."""
    return adapter.type != "full"


def _several(optim: OptimConfig) -> bool:
    """Whether a step has more than one update."""
    return optim.num_iterations * optim.num_minibatches > 1


def optimizer_step(optim: OptimConfig, adapter: AdapterConfig, model: nn.Module, optimizer: int, gpu: bool) -> int:
    """Bytes in addition to what stays: the gradient with the temporary arrays of a group, or of the norm before that.

    An adapter's state before a step is kept until the step is done, so the new state needs memory of its own, which
    replaces the gradient's as the gradient is used up. (With several updates per step, the former state counts as
    staying.) Full weights are updated in place.
    """
    trained = model.trainable_parameters()
    numbers: int = sum(array.size for _, array in tree_flatten(trained))
    made = _bytes(trained) + optimizer if _holds_former(adapter) and not _several(optim) else 0
    moving = max(4 * numbers, made) + bytes_of_a_group(optim, trained, gpu)
    return max(moving, 4 * numbers + bytes_of_a_norm(trained))


def _bytes(tree: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))


def count_weights(model: nn.Module) -> int:
    """The number of parameters. A quantized layer counts its weights, not the integers that they are packed into."""
    count: int = sum(array.size for _, array in tree_flatten(model.parameters()))
    for module in model.modules():
        if hasattr(module, "bits"):
            scales = [module[name].size for name in ("scales", "biases") if name in module]
            count += module.weight.size * 32 // module.bits - module.weight.size - sum(scales)
    return count
