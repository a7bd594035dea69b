"""The optimizer: one of MLX's, with float32 weights and moments (or moments in 8 bits), whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from grpo.backend.device import compiled, on_gpu
from grpo.config import OptimConfig
from grpo.training.algorithms import make_optimizer
from grpo.training.inplace import InPlace, parts_of
from grpo.training.moments import (
    MAPS,
    SMALLEST,
    Map,
    forms_of,
    large,
    maps_of,
    names_of,
    packed,
    those_packed,
    unpacked,
)

ByPath = dict[str, Any]
"""Arrays by path or name."""

GROUP = 2**22
"""Parameters per group, which are updated together: 16 MB of each kind of array. A LoRA makes a few groups, full
weights make hundreds."""
TOGETHER = 2**14
"""The same for small arrays on a CPU, where launches cost nothing. Four arrays of 1 MB took 3.0 ms one by one, with
4 MB of temporary memory, and 8.0 ms together, with 17 MB."""
AT_WORK = {"muon": 80, "adadelta": 24, "rmsprop": 12, "adagrad": 12}
"""Maximum bytes of temporary memory per parameter of a group during its update, measured on a CPU, by optimizer."""
MOST_AT_WORK, MOST_IN_FLIGHT = 16, 28
"""The same for optimizers that `AT_WORK` does not list, and the least to assume if more operations are in flight: on a
GPU, or if moments are packed."""
PACKING = 27
"""Additional bytes per parameter for each moment that is packed into 8 bits. Measured on a CPU: up to 51 bytes in all
with one moment, and up to 82 with two."""
IN_PARTS = 12
"""Additional bytes per parameter for parts of a large array: new numbers need their own memory until they are complete.
"""
WHOLE = frozenset({"adafactor", "muon"})
"""Optimizers that use rows and columns, and so need whole arrays. All others are elementwise."""
OWN, PRECISE, WEIGHT = "own", "precise", "weight"


class Float32Optimizer:
    """An optimizer that updates float32 copies of the parameters that are not float32, and rounds them into the model.

    In bfloat16 an update of less than 1/256 of a weight is lost by rounding; the copies accumulate small updates.

    Parameters are updated in groups, each computed before the next. The optimizer keeps no reference to a group's old
    arrays, so MLX writes the new arrays over them. A step therefore needs one set of weights, copies and moments (16
    bytes per parameter for AdamW in float32, gradients included; 18 in bfloat16), not two. If the caller keeps the old
    arrays, as a run does with an adapter (`Trainer.wholly`), they need memory in addition.

    With `moments: int8`, moments are packed into 8 bits between steps (10 and 12 bytes per parameter for AdamW), and
    only the moments of the current group are float32.

    A parameter that is larger than a group is updated in parts, each written into the parameter's own memory.
    """

    def __init__(self, cfg: OptimConfig, parameters: Any) -> None:
        self._name, self._optimizer, self._maps = cfg.optimizer, make_optimizer(cfg), maps_of(cfg)
        flat: ByPath = tree_flatten(parameters, destination={})
        self._precise: ByPath | None = None
        if any(array.dtype != mx.float32 for array in flat.values()):
            self._precise = {path: array.astype(mx.float32) for path, array in flat.items()}
        self._optimizer.init({OWN: [array.astype(mx.float32) for array in flat.values()]})
        self._shared = self._optimizer.state
        empty = [packed(own, large(own, self._maps), self._shared["step"]) for own in self._shared.pop(OWN)]
        self._own: dict[str, ByPath] = dict(zip(flat, empty, strict=True))
        self._step = compiled(self._stepped) if cfg.compile else self._stepped  # one kernel per array, not fifteen

    @property
    def learning_rate(self) -> Any:
        return self._shared["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._shared = {**self._shared, "learning_rate": mx.array(value, mx.float32)}

    @property
    def note(self) -> str | None:
        """A note for `moments: int8` if no moment is in 8 bits, because all trained arrays are too small; else None."""
        if not self._maps or any(those_packed(own, self._maps) for own in self._own.values()):
            return None
        return f"optim.moments: int8 does nothing here: every trained array has fewer than {SMALLEST:,} numbers"

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's whole state: moments, step, learning rate, and the float32 copies if there are any."""
        flat = dict(self._shared)
        for path, arrays in self._own.items():
            flat.update({f"{path}.{name}": array for name, array in arrays.items()})
        flat.update({f"{PRECISE}.{path}": array for path, array in (self._precise or {}).items()})
        nested: dict[str, Any] = tree_unflatten(list(flat.items()))
        return nested

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        flat: ByPath = tree_flatten(state, destination={})
        self._shared = {name: flat[name] for name in self._shared}
        self._own = {path: {name: flat[f"{path}.{name}"] for name in arrays} for path, arrays in self._own.items()}
        if self._precise is not None:
            self._precise = {path: flat[f"{PRECISE}.{path}"] for path in self._precise}

    def update(self, model: nn.Module, gradients: ByPath, scale: mx.array | float = 1.0) -> None:
        """Make one step on the model's trainable parameters. The new values are computed when this returns.

        gradients: float32, by path of the parameter; each is multiplied by `scale`. Empties the dictionary as it goes,
        so that the memory of gradients without other references is reused.
        """
        shared = self._shared
        factors = self._optimizer.factors(shared) if hasattr(self._optimizer, "factors") else {}
        for paths in grouped(gradients, together(self._maps, on_gpu())):
            mine = {path: gradients.pop(path) for path in paths}
            self._move(model, mine, scale, shared | factors)

    def _move(self, model: nn.Module, gradients: ByPath, scale: mx.array | float, shared: ByPath) -> None:
        """Update a group, or a single parameter that is larger than a group. Empties `gradients`."""
        path = next(iter(gradients))
        if self._name not in WHOLE and gradients[path].size > numbers_at_once(self._maps):
            self._move_in_place(model, path, gradients.pop(path), scale, shared)
        else:
            mx.eval(self._moved_together(model, gradients, scale, shared))

    def _moved_together(
        self, model: nn.Module, gradients: ByPath, scale: mx.array | float, shared: ByPath
    ) -> list[Any]:
        """Replace a group's parameters, copies and state with the updated ones. Returns these, not yet computed."""
        paths = list(gradients)
        parameters: ByPath = tree_flatten(model.trainable_parameters(), destination={})
        old = [parameters[path] for path in paths]
        precise = old if self._precise is None else [self._precise[path] for path in paths]
        state = {**shared, OWN: [self._own[path] for path in paths]}
        moved, rounded, state = self._step([gradients.pop(path) for path in paths], scale, precise, old, state)
        model.update(tree_unflatten(list(zip(paths, rounded, strict=True))))
        if self._precise is not None:
            self._precise.update(zip(paths, moved, strict=True))
        own = state.pop(OWN)
        self._own.update(zip(paths, own, strict=True))
        self._shared = {name: state[name] for name in self._shared}  # without the factors
        return [moved, rounded, own, state]

    def _move_in_place(
        self, model: nn.Module, path: str, gradient: mx.array, scale: mx.array | float, shared: ByPath
    ) -> None:
        """Update a parameter that is larger than a group, part by part. Meanwhile, the model has a placeholder."""
        held: ByPath = {**self._own.pop(path), WEIGHT: tree_flatten(model.trainable_parameters(), destination={})[path]}
        if self._precise is not None:
            held[PRECISE] = self._precise.pop(path)
        model.update(tree_unflatten([(path, mx.zeros(1, held[WEIGHT].dtype))]))
        whole, slopes = InPlace(held), gradient.reshape(-1)
        try:
            for where in parts_of(gradient.size, numbers_at_once(self._maps)):
                whole.write(where, self._moved(slopes[where], scale, whole.part(where), shared))
        finally:
            held = whole.arrays()
            model.update(tree_unflatten([(path, held.pop(WEIGHT))]))
            if self._precise is not None:
                self._precise[path] = held.pop(PRECISE)
            self._own[path] = held

    def _moved(self, gradient: mx.array, scale: mx.array | float, part: ByPath, shared: ByPath) -> ByPath:
        """A part of a parameter and of its state after the update, computed."""
        weight = part.pop(WEIGHT)
        precise = part.pop(PRECISE, weight)
        moved, rounded, state = self._step([gradient], scale, [precise], [weight], {**shared, OWN: [part]})
        mx.eval(moved, rounded, state)
        (own,) = state.pop(OWN)
        self._shared = {name: state[name] for name in self._shared}
        return {**own, WEIGHT: rounded[0], **({} if self._precise is None else {PRECISE: moved[0]})}

    def _stepped(self, gradients: Any, scale: Any, precise: Any, parameters: Any, state: Any) -> tuple[Any, Any, Any]:
        """The updated parameters in float32, the same rounded, and the optimizer's new state. A pure function of its
        arguments, so that it can be compiled."""
        coarse = state[OWN]
        own = [unpacked(one, self._maps) for one in coarse]
        self._optimizer.state = {**state, OWN: own}  # new dictionaries, because the optimizer writes into them
        scaled = {OWN: [gradient * scale for gradient in gradients]}
        moved = self._optimizer.apply_gradients(scaled, {OWN: precise})[OWN]
        state, self._optimizer.state = self._optimizer.state, {}
        pairs = zip(state[OWN], coarse, strict=True)
        state[OWN] = [packed(own, those_packed(before, self._maps), state["step"]) for own, before in pairs]
        return moved, [new.astype(old.dtype) for new, old in zip(moved, parameters, strict=True)], state

    def fitted(self, saved: Mapping[str, mx.array]) -> ByPath:
        """A saved state, flat, with its moments converted to this optimizer's form (float32 or 8 bits).

        So a run may resume with different `moments`. The state of a different optimizer is returned unchanged.
        """
        fitted = dict(saved)
        for path, own in self._own.items():
            arrays = {key: fitted.pop(f"{path}.{key}") for key in forms_of(own) if f"{path}.{key}" in fitted}
            other_form = arrays.keys() != own.keys() and names_of(arrays) == names_of(own)
            if other_form and "step" in fitted:
                arrays = packed(unpacked(arrays, MAPS[self._name]), those_packed(own, self._maps), fitted["step"])
            fitted.update({f"{path}.{key}": array for key, array in arrays.items()})
        return fitted


def grouped(arrays: Mapping[str, mx.array], numbers: int | None = None) -> list[list[str]]:
    """Paths in order, in groups whose arrays have at most `numbers` numbers in all (None: `GROUP`).

    A larger array is a group of its own.
    """
    most, room = numbers or GROUP, 0
    groups: list[list[str]] = []
    for path, array in arrays.items():
        if not groups or array.size > room:
            groups.append([])
            room = most
        groups[-1].append(path)
        room -= array.size
    return groups


def numbers_at_once(maps: Mapping[str, Map]) -> int:
    """The maximum size of a group: half of `GROUP` if moments are packed, because packing needs more memory."""
    return GROUP // 2 if maps else GROUP


def together(maps: Mapping[str, Map], gpu: bool) -> int:
    """The maximum size of a group of several small arrays."""
    return numbers_at_once(maps) if gpu else min(TOGETHER, numbers_at_once(maps))


def bytes_of_a_group(cfg: OptimConfig, parameters: Any, gpu: bool) -> int:
    """Bytes that a step needs besides gradients, weights and state: those of its largest group. `gpu`: whether it runs
    on a GPU.

    A parameter that is updated in parts may have to be copied first, if decoding has joined it with others.
    """
    flat: ByPath = tree_flatten(parameters, destination={})
    maps = maps_of(cfg)
    most, groups = numbers_at_once(maps), grouped(flat, together(maps, gpu))
    least = MOST_IN_FLIGHT if gpu or maps else 0
    each = max(AT_WORK.get(cfg.optimizer, MOST_AT_WORK), least) + PACKING * len(maps)
    largest: int = max((sum(flat[path].size for path in paths) for paths in groups), default=0)
    if cfg.optimizer in WHOLE or largest <= most:
        return each * largest
    copied: int = max(array.nbytes for array in flat.values())
    return (each + IN_PARTS) * most + copied
