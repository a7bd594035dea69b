"""The optimizer: one of MLX's by its name, with float32 weights and, unless they are to be in 8 bits, float32 moments,
whatever the model's dtype is."""

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
"""Numbers that move together: 16 MB of each kind of array. A LoRA is a few groups, whole weights are hundreds."""
TOGETHER = 2**14
"""The same for small arrays on a CPU, which waits for no launches: four arrays of 1 MB took 3.0 ms one by one, with 4
MB at work, and 8.0 ms together, with 17 MB at work."""
AT_WORK = {"muon": 80, "adadelta": 24, "rmsprop": 12, "adagrad": 12}
MOST_AT_WORK, MOST_IN_FLIGHT = 16, 28
"""Bytes for each number of a group while it moves, at most, as measured on a CPU, of optimizers that `AT_WORK` does not
name. Where more operations are in flight, on a GPU or where moments are packed, no fewer than `MOST_IN_FLIGHT`."""
PACKING = 27
"""The same for each moment that is packed into 8 bits on the way, besides. On a CPU 51 were seen in all with one
moment, at most, and 82 with two."""
IN_PARTS = 12
"""The same for the parts of a large array, whose memory the new numbers cannot take before they are computed."""
WHOLE = frozenset({"adafactor", "muon"})
"""Optimizers that look at rows and columns, and so at whole arrays; all others at each number by itself."""
OWN, PRECISE, WEIGHT = "own", "precise", "weight"


class Float32Optimizer:
    """An optimizer that moves float32 copies of the parameters that are not float32, and rounds them into the model.

    In bfloat16 an update of less than 1/256 of a weight is lost; the copies add such updates up.

    Parameters move in groups, each computed before the next begins, and nothing here refers to what a group's arrays
    were before: MLX writes the new ones over the old ones. So a step holds one set of weights, copies and moments
    (16 bytes a parameter for AdamW in float32, gradients included; 18 in bfloat16), not two. Where somebody holds what
    was before, as a run does with an adapter (`Trainer.wholly`), that is there besides.

    With `moments: int8` moments are packed in 8 bits between steps (10 and 12 bytes a parameter for AdamW), and only
    those of the group at work are float32.

    A parameter that is larger than a group moves in parts, each written into the parameter's own memory.
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
        self._step = compiled(self._stepped) if cfg.compile else self._stepped  # a kernel an array, not fifteen

    @property
    def learning_rate(self) -> Any:
        return self._shared["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._shared = {**self._shared, "learning_rate": mx.array(value, mx.float32)}

    @property
    def note(self) -> str | None:
        """What to say where moments are to be in 8 bits and none is, because everything that trains is small."""
        if not self._maps or any(those_packed(own, self._maps) for own in self._own.values()):
            return None
        return f"optim.moments: int8 does nothing here: every array that trains has fewer than {SMALLEST:,} numbers"

    @property
    def state(self) -> dict[str, Any]:
        """All that is needed to go on: moments, step, and the float32 copies where there are any."""
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
        """One step on the model's trainable parameters, computed when this returns.

        gradients: float32, by the parameters' paths; each is multiplied by `scale`. The dictionary is emptied on the
        way, so that gradients which nobody else holds make room as they are used.
        """
        shared = self._shared
        factors = self._optimizer.factors(shared) if hasattr(self._optimizer, "factors") else {}
        for paths in grouped(gradients, together(self._maps, on_gpu())):
            mine = {path: gradients.pop(path) for path in paths}
            self._move(model, mine, scale, shared | factors)

    def _move(self, model: nn.Module, gradients: ByPath, scale: mx.array | float, shared: ByPath) -> None:
        """Move a group, or a parameter that is larger than one. Empties `gradients`."""
        path = next(iter(gradients))
        if self._name not in WHOLE and gradients[path].size > numbers_at_once(self._maps):
            self._move_in_place(model, path, gradients.pop(path), scale, shared)
        else:
            mx.eval(self._moved_together(model, gradients, scale, shared))

    def _moved_together(
        self, model: nn.Module, gradients: ByPath, scale: mx.array | float, shared: ByPath
    ) -> list[Any]:
        """Put what a group becomes in the place of what it is, and return that, not yet computed."""
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
        """Move a parameter that is larger than a group, part by part. The model lacks it meanwhile."""
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
        """What a part of a parameter and of its state becomes, computed."""
        weight = part.pop(WEIGHT)
        precise = part.pop(PRECISE, weight)
        moved, rounded, state = self._step([gradient], scale, [precise], [weight], {**shared, OWN: [part]})
        mx.eval(moved, rounded, state)
        (own,) = state.pop(OWN)
        self._shared = {name: state[name] for name in self._shared}
        return {**own, WEIGHT: rounded[0], **({} if self._precise is None else {PRECISE: moved[0]})}

    def _stepped(self, gradients: Any, scale: Any, precise: Any, parameters: Any, state: Any) -> tuple[Any, Any, Any]:
        """What parameters become, rounded and not, and the optimizer's state, as functions of nothing else."""
        coarse = state[OWN]
        own = [unpacked(one, self._maps) for one in coarse]
        self._optimizer.state = {**state, OWN: own}  # dictionaries of its own, to be written into
        scaled = {OWN: [gradient * scale for gradient in gradients]}
        moved = self._optimizer.apply_gradients(scaled, {OWN: precise})[OWN]
        state, self._optimizer.state = self._optimizer.state, {}
        pairs = zip(state[OWN], coarse, strict=True)
        state[OWN] = [packed(own, those_packed(before, self._maps), state["step"]) for own, before in pairs]
        return moved, [new.astype(old.dtype) for new, old in zip(moved, parameters, strict=True)], state

    def fitted(self, saved: Mapping[str, mx.array]) -> ByPath:
        """A saved state, flat, with its moments in the form in which this optimizer keeps them.

        So a run may go on with other `moments`. What is no state of such an optimizer comes back as it is.
        """
        fitted = dict(saved)
        for path, own in self._own.items():
            theirs = {key: fitted.pop(f"{path}.{key}") for key in forms_of(own) if f"{path}.{key}" in fitted}
            other_form = theirs.keys() != own.keys() and names_of(theirs) == names_of(own)
            if other_form and "step" in saved:
                theirs = packed(unpacked(theirs, MAPS[self._name]), those_packed(own, self._maps), saved["step"])
            fitted.update({f"{path}.{key}": array for key, array in theirs.items()})
        return fitted


def grouped(arrays: Mapping[str, mx.array], numbers: int | None = None) -> list[list[str]]:
    """Paths in their order, in groups whose arrays have so many `numbers` at most, or are a single larger array.

    None: `GROUP`.
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
    """The numbers of a group: half as many where moments are packed, which takes more for each."""
    return GROUP // 2 if maps else GROUP


def together(maps: Mapping[str, Map], gpu: bool) -> int:
    """The numbers of small arrays that move together."""
    return numbers_at_once(maps) if gpu else min(TOGETHER, numbers_at_once(maps))


def bytes_of_a_group(cfg: OptimConfig, parameters: Any, gpu: bool) -> int:
    """What a step holds beside gradients, weights and state: for its largest group. `gpu`: whether a GPU moves it.

    A parameter that moves in parts may have to be copied first, where decoding has joined it to others.
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
