"""MLX's Adam and AdamW, with scalars that all arrays share computed outside the compiled step.

Inside the compiled step each scalar would be a separate kernel, which takes seconds to build on CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim


class _Prepared:
    """A mixin for MLX's classes: computes the same numbers, from `factors` if these are in the optimizer's state."""

    def factors(self: Any, shared: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The scalars that `apply_single` reads from the optimizer's state, computed from the state before the step.

        `rate` is the learning rate, and `root` multiplies the root of the second moment, both with bias correction;
        `decay` is the factor that weight decay applies to a weight.
        """
        rate, step, (first, second) = shared["learning_rate"], shared["step"] + 1, self.betas
        return {
            "rate": rate / (1 - first**step) if self.bias_correction else rate,
            "root": mx.rsqrt(1 - second**step) if self.bias_correction else mx.array(1.0),
            "decay": 1 - rate * getattr(self, "weight_decay", 0.0),
        }

    def apply_single(self: Any, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """The updated value of a float32 parameter. Writes the new moments into `state`."""
        if "rate" not in (factors := self.state):
            return super().apply_single(gradient, parameter, state)  # type: ignore[misc,no-any-return]
        first, second = self.betas
        state["m"] = first * state["m"] + (1 - first) * gradient
        state["v"] = second * state["v"] + (1 - second) * mx.square(gradient)
        if getattr(self, "weight_decay", 0.0):
            parameter = parameter * factors["decay"]
        moved: mx.array = parameter - factors["rate"] * state["m"] / (mx.sqrt(state["v"]) * factors["root"] + self.eps)
        return moved


class Adam(_Prepared, optim.Adam):  # type: ignore[misc]  # untyped
    """arXiv 1412.6980."""


class AdamW(_Prepared, optim.AdamW):  # type: ignore[misc]
    """arXiv 1711.05101."""
