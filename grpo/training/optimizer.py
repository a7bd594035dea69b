"""The optimiser: one of MLX's by its name, with float32 state and weights whatever the model's dtype is."""

from __future__ import annotations

import inspect
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from grpo.backend.device import compiled
from grpo.config import OptimConfig
from grpo.errors import UserError

CLASSES: dict[str, Any] = {
    "adamw": optim.AdamW,
    "adam": optim.Adam,
    "adamax": optim.Adamax,
    "sgd": optim.SGD,
    "lion": optim.Lion,
    "adafactor": optim.Adafactor,
    "muon": optim.Muon,
    "rmsprop": optim.RMSprop,
    "adagrad": optim.Adagrad,
    "adadelta": optim.AdaDelta,
}

OURS: dict[str, dict[str, Any]] = {
    "adam": {"bias_correction": True},
    "adamw": {"bias_correction": True},
    "adafactor": {"relative_step": False, "scale_parameter": False},  # or it would not heed the learning rate
}
"""What differs from MLX's defaults: what the algorithms' papers say."""


def make_optimizer(cfg: OptimConfig) -> Any:
    """MLX's optimiser of that name. Raises UserError for arguments that it does not have."""
    kind = CLASSES[cfg.optimizer]
    # Adamax hands on to Adam, but has a signature of its own.
    known = [name for name in inspect.signature(kind).parameters if name not in ("learning_rate", "weight_decay")]
    for name in cfg.optimizer_args:
        if name not in known:
            where = (
                "that is optim." + name if name in ("learning_rate", "weight_decay") else "it has " + ", ".join(known)
            )
            raise UserError(f"optim.optimizer_args: {cfg.optimizer} takes no {name!r} here; {where}")
    arguments = {"learning_rate": cfg.learning_rate, **OURS.get(cfg.optimizer, {}), **cfg.optimizer_args}
    if "weight_decay" in inspect.signature(kind).parameters:
        arguments["weight_decay"] = cfg.weight_decay
    elif cfg.weight_decay:
        raise UserError(f"optim.weight_decay does nothing with {cfg.optimizer}, which has none")
    try:
        return kind(**arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"optim.optimizer_args: {error}") from None


class Float32Optimizer:
    """An optimiser that moves float32 copies of the parameters that are not, and rounds them into the model.

    In bfloat16 an update of less than 1/256 of a weight is lost; the copies add such updates up.
    """

    def __init__(self, cfg: OptimConfig, parameters: Any) -> None:
        self._optimizer = make_optimizer(cfg)
        rounded = any(array.dtype != mx.float32 for _, array in tree_flatten(parameters))
        self._precise: Any = tree_map(_float32, parameters) if rounded else None
        self._optimizer.init(tree_map(_float32, parameters))
        self._step = compiled(self._stepped) if cfg.compile else self._stepped  # a kernel an array, not fifteen

    @property
    def learning_rate(self) -> Any:
        return self._optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._optimizer.learning_rate = value

    @property
    def state(self) -> dict[str, Any]:
        """All that is needed to go on: moments, step, and the float32 copies where there are any."""
        copies = {} if self._precise is None else {"precise": self._precise}
        held: dict[str, Any] = tree_map(lambda array: array, {**self._optimizer.state, **copies})  # dicts of its own
        return held

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        rest = dict(state)
        copies = tree_flatten(rest.pop("precise", {}), destination={})
        if self._precise is not None:  # what was read from a file lacks the model's modules without parameters
            self._precise = tree_map_with_path(lambda path, _: copies[path], self._precise)
        self._optimizer.state = rest

    def update(self, model: nn.Module, gradients: Any) -> None:
        """One step on the model's trainable parameters; the gradients' tree is float32 and of their structure."""
        parameters = model.trainable_parameters()
        precise = parameters if self._precise is None else self._precise
        moved, rounded, self._optimizer.state = self._step(gradients, precise, parameters, self._optimizer.state)
        model.update(rounded)
        if self._precise is not None:
            self._precise = moved

    def _stepped(self, gradients: Any, precise: Any, parameters: Any, state: Any) -> tuple[Any, Any, Any]:
        """What parameters become, rounded and not, and the optimiser's state, as functions of nothing else."""
        self._optimizer.state = state
        moved = self._optimizer.apply_gradients(gradients, precise)
        return moved, tree_map(lambda new, old: new.astype(old.dtype), moved, parameters), self._optimizer.state


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32)
