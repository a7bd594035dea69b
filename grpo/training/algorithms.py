"""MLX's optimizers by the names of `optim.optimizer`, with the papers' defaults where MLX has others."""

from __future__ import annotations

import inspect
from typing import Any

import mlx.optimizers as optim

from grpo.config import OptimConfig
from grpo.errors import UserError
from grpo.training.adam import Adam, AdamW
from grpo.training.moments import maps_of

CLASSES: dict[str, Any] = {
    "adamw": AdamW,
    "adam": Adam,
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
    "adafactor": {"relative_step": False, "scale_parameter": False},  # else it would ignore the learning rate
}
"""Arguments whose default differs from MLX's, because the algorithm's paper differs."""


def make_optimizer(cfg: OptimConfig) -> Any:
    """MLX's optimizer for `optim.optimizer`. Raises UserError for arguments or moments that it does not have."""
    maps_of(cfg)
    kind = CLASSES[cfg.optimizer]
    # the signature of the class itself: Adamax passes its arguments to Adam, but does not take all of Adam's
    known = [name for name in inspect.signature(kind).parameters if name not in ("learning_rate", "weight_decay")]
    for name in cfg.optimizer_args:
        if name not in known:
            elsewhere = name in ("learning_rate", "weight_decay")
            instead = f"set optim.{name}" if elsewhere else f"it takes {', '.join(known)}"
            raise UserError(f"optim.optimizer_args: {cfg.optimizer} takes no {name!r} here; {instead}")
    arguments = {"learning_rate": cfg.learning_rate, **OURS.get(cfg.optimizer, {}), **cfg.optimizer_args}
    if "weight_decay" in inspect.signature(kind).parameters:
        arguments["weight_decay"] = cfg.weight_decay
    elif cfg.weight_decay:
        raise UserError(f"optim.weight_decay does nothing with {cfg.optimizer}, which has no weight decay")
    try:
        return kind(**arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"optim.optimizer_args: {error}") from None
