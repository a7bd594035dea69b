"""GRPO fine-tuning on one machine with MLX.

The names below are the Python API. Each name is imported on first use, because importing MLX takes a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo.backend import blas, device

if TYPE_CHECKING:
    from grpo.door.learning import Loss as Loss
    from grpo.door.learning import advantages as advantages
    from grpo.door.learning import batches as batches
    from grpo.door.optimizers import optimizer as optimizer
    from grpo.door.policy import load as load
    from grpo.door.recipes import recipe as recipe
    from grpo.door.rewards import reward as reward
    from grpo.door.rewards import score as score
    from grpo.door.stopping import STOP as STOP
    from grpo.door.tasks import tasks as tasks
    from grpo.door.trainer import Trainer as Trainer
    from grpo.errors import RunError as RunError
    from grpo.errors import UserError as UserError
    from grpo.step import Step as Step
    from grpo.types import Batch as Batch
    from grpo.types import EvalMetrics as EvalMetrics
    from grpo.types import Group as Group
    from grpo.types import StepMetrics as StepMetrics

# This runs before any module of the package, and so before `mlx.core` is imported.
blas.preload()
device.preset()

__version__ = "0.1.0"

_DOOR = {
    "grpo.door.learning": ("Loss", "advantages", "batches"),
    "grpo.door.optimizers": ("optimizer",),
    "grpo.door.policy": ("load",),
    "grpo.door.recipes": ("recipe",),
    "grpo.door.rewards": ("reward", "score"),
    "grpo.door.stopping": ("STOP",),
    "grpo.door.tasks": ("tasks",),
    "grpo.door.trainer": ("Trainer",),
    "grpo.errors": ("RunError", "UserError"),
    "grpo.step": ("Step",),
    "grpo.types": ("Batch", "EvalMetrics", "Group", "StepMetrics"),
}
"""The public names of each module."""
_PLACES = {name: module for module, names in _DOOR.items() for name in names}

__all__ = sorted(_PLACES)


if not TYPE_CHECKING:  # otherwise a type checker would accept every name

    def __getattr__(name: str) -> object:
        """Import a public name on first use."""
        if name not in _PLACES:
            raise AttributeError(f"module 'grpo' has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(_PLACES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
