"""LoRA layers, and their states by name.

A state is the arrays of every LoRA layer. Switching swaps arrays in the modules, which costs microseconds and
holds under `mx.compile` too, as long as the model's state is an input of the compiled function. (The `scale` of
a layer is a constant of the trace: setting it to 0 would be silently ignored.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from grpo.backend.hub import one_line
from grpo.config import AdapterConfig
from grpo.errors import UserError

State = Mapping[str, mx.array]

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


class Adapters:
    """The LoRA layers of a model and their named states: `policy`, which trains, and `reference`, the base model."""

    def __init__(self, model: nn.Module, cfg: AdapterConfig, key: mx.array) -> None:
        """Put LoRA layers into `model` (in place), A drawn with `key` and B zero, so that nothing changes yet.

        Raises UserError if a target is not a linear layer of the model.
        """
        self.model = model
        self.config = _mlx_lm_config(model, cfg)
        _add_layers(model, self.config, key)
        self.active = "policy"
        self._parked: dict[str, State] = {"reference": _base_state(self.state())}

    def state(self) -> dict[str, mx.array]:
        """The arrays of the active state, by their path in the model."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    def load_state(self, state: State) -> None:
        """Replace the arrays of the active state."""
        self.model.update(tree_unflatten(list(state.items())))

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Make another state active inside the block, and the former one again after it, come what may."""
        if name == self.active:
            yield
            return
        former = self.active
        self._swap(name)
        try:
            yield
        finally:
            self._swap(former)

    def _swap(self, name: str) -> None:
        state = self._parked.pop(name)
        self._parked[self.active] = self.state()
        self.load_state(state)
        self.active = name

    def delta(self) -> float:
        """The norm of what the adapter adds to the model's weights, `scale · B A` over all layers: 0 at first."""
        state, scale = self.state(), self.config["lora_parameters"]["scale"]
        total = mx.array(0.0)
        for path, a in state.items():
            if path.endswith("lora_a"):
                a, b = a.astype(mx.float32), state[f"{path[:-1]}b"].astype(mx.float32)
                if a.ndim == 3:  # experts keep both the other way round
                    a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
                # |AB|² = Σ (AᵀA) ∘ (BBᵀ), without ever making AB
                total = total + ((a.swapaxes(-1, -2) @ a) * (b @ b.swapaxes(-1, -2))).sum()
        return float(scale * mx.sqrt(mx.maximum(total, 0)).item())

    def save(self, folder: Path) -> None:
        """Write the policy's state as mlx-lm reads it (`mlx_lm.generate --adapter-path`)."""
        assert self.active == "policy"
        mx.save_safetensors(str(folder / WEIGHTS), self.state())
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Make a saved adapter of the same shape the policy's state. Raises UserError where it does not fit."""
        assert self.active == "policy"
        try:
            saved = mx.load(str(folder / WEIGHTS))
        except (OSError, RuntimeError) as error:
            raise UserError(f"adapter {folder}: cannot be read: {error}") from error
        shapes = {path: array.shape for path, array in self.state().items()}
        assert isinstance(saved, dict)
        if {path: array.shape for path, array in saved.items()} != shapes:
            raise UserError(f"adapter {folder}: has other layers or another rank than this model's adapter")
        self.load_state(saved)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put a saved adapter into `model`, with mlx-lm's own loader. Raises UserError where it does not fit."""
    from mlx_lm.tuner.utils import load_adapters

    try:
        load_adapters(model, str(folder))
    except Exception as error:  # whatever a file that is not what it should be makes the loader raise
        why = f"it wants an adapter as mlx-lm writes them: {one_line(error)}"
        raise UserError(f"adapter {folder}: cannot be loaded; {why}") from error


def linear_layers(model: nn.Module) -> list[str]:
    """The linear layers of the model's blocks by their path in a block, in order and once each."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    paths = [path for block in model.layers for path, module in block.named_modules() if isinstance(module, kinds)]
    return list(dict.fromkeys(sorted(paths)))


def _mlx_lm_config(model: nn.Module, cfg: AdapterConfig) -> dict[str, Any]:
    """What mlx-lm's `adapter_config.json` says."""
    there = linear_layers(model)
    keys = there if cfg.targets == "all-linear" else list(cfg.targets)
    if missing := [key for key in keys if key not in there]:
        raise UserError(f"adapter.targets: no linear layer {missing[0]!r} in this model; it has {', '.join(there)}")
    return {
        "fine_tune_type": cfg.type,
        "num_layers": len(model.layers),
        "lora_parameters": {"rank": cfg.rank, "scale": cfg.scale, "dropout": 0.0, "keys": keys},
    }


def _add_layers(model: nn.Module, config: dict[str, Any], key: mx.array) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"])
    fresh = tree_flatten(model.trainable_parameters())
    keys = mx.random.split(key, len(fresh))
    drawn = [(path, _redraw(path, array, k)) for (path, array), k in zip(fresh, keys, strict=True)]
    model.update(tree_unflatten(drawn))
    mx.eval(model.trainable_parameters())


def _redraw(path: str, array: mx.array, key: mx.array) -> mx.array:
    """A layer's A again, uniform in ± 1/√d as mlx-lm draws it, but from a key and not from global state."""
    if not path.endswith("lora_a"):
        return array
    inputs = array.shape[0] if array.ndim == 2 else array.shape[-1]
    return mx.random.uniform(-(inputs**-0.5), inputs**-0.5, array.shape, array.dtype, key=key)


def _base_state(state: State) -> State:
    """The state in which the adapter adds nothing: B zero."""
    return {path: mx.zeros_like(a) if path.endswith("lora_b") else a for path, a in state.items()}
