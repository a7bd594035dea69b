"""Computes the parts of a checkpointed layer that process tokens independently (MLPs, experts) in tiles of tokens.

The backward pass recomputes a checkpointed layer, and then stores the MLP's intermediate arrays for all tokens: for
models with 8 B parameters, a third of the memory of an update. In tiles, nothing is computed more often, and the
intermediate arrays exist for one tile at a time.

A trial finds these modules, whatever their names are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend.blame import cause
from grpo.backend.device import on_gpu
from grpo.model.adapters import EXPERTS, LINEAR
from grpo.model.attending import as_now
from grpo.model.dropout import BLOCK, LoRADropout, dropout_key, dropping
from grpo.model.outline import used_experts
from grpo.model.pieces import in_pieces

NUMBERS = {False: 2**19, True: 2**26}
"""Most numbers in the outputs of a tile's products, by whether there is a GPU: 2 MB in float32 on a CPU, 128 MB in 16
bits on a GPU. A tile is a whole number of blocks of dropout's masks, and a single block may exceed this."""
PAYING = 2
"""With fewer tiles than this, all tokens are computed together."""

TRIED = mx.array([[1, 2, 3]])
TINY = 1e-30
"""Replaces a norm of 0: a layer that was added to a trained model may begin with a last matrix of zeros."""


def tile_tokens(numbers: int, gpu: bool) -> int:
    """Number of tokens per tile, if the products inside a part have `numbers` outputs per token."""
    return max(1, NUMBERS[gpu] // numbers // BLOCK) * BLOCK


class RowWise:
    """The row-wise parts of a model's layers.

    `fault` is the reason why a part that is called like a row-wise part is not row-wise, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.fault: str | None = None
        self._model, self._calls = model, _recorded_calls(model)
        self._tried: dict[tuple[type, ...], bool] = {}
        self._parts = {id(layer): list(self._found(layer)) for layer in model.layers}
        del self._calls  # frees the arrays

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))

    @contextmanager
    def inside(self, layer: nn.Module) -> Iterator[None]:
        """Inside the block this layer's row-wise parts are computed in tiles, if there are enough tokens."""
        parts = self._parts[id(layer)]
        formers = [type(part) for part, _ in parts]
        try:
            for (part, size), former in zip(parts, formers, strict=True):
                part.__class__ = type(former.__name__, (_InTiles, former), {"tile": size})
            yield
        finally:
            for (part, _), former in zip(parts, formers, strict=True):
                part.__class__ = former

    def _found(self, module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
        """The outermost row-wise modules inside a module, each with its number of tokens per tile."""
        for _, child in tree_flatten(module.children(), is_leaf=nn.Module.is_module):
            if self._is_row_wise(child):
                yield child, self._tile_tokens(child)
            else:
                yield from self._found(child)

    def _is_row_wise(self, module: nn.Module) -> bool:
        call = self._calls.get(id(module))
        if call is None or _drops_by_place(module):
            return False
        kind = tuple(map(type, module.modules()))
        if kind not in self._tried:
            self._tried[kind] = self._holds(module, call)
        return self._tried[kind]

    def _holds(self, module: nn.Module, call: _Call) -> bool:
        """Whether each token alone gives the same result as among other tokens."""
        try:
            alone = mx.concatenate([module(call.x[:, i : i + 1]) for i in range(TRIED.size)], axis=1)
            out, alone = call.out.astype(mx.float32), alone.astype(mx.float32)
            gap: Any = (mx.linalg.norm(alone - out) / mx.maximum(mx.linalg.norm(out), TINY)).item()
        except Exception as error:  # the model's code, or grpo's, may raise anything
            self.fault = f"{type(module).__name__}: {cause(error)}"
            return False
        bound = 0.01 if call.out.dtype == mx.float32 else 0.1  # rounding stays below; a real difference is ~1
        same: bool = gap < bound
        if not same:
            self.fault = f"{type(module).__name__} gives a token another result among other tokens (gap {gap:.2g})"
        return same

    def _tile_tokens(self, part: nn.Module) -> int:
        numbers = 0
        for module in part.modules():
            if isinstance(module, LINEAR):
                used = used_experts(self._model, default=1) if isinstance(module, EXPERTS) else 1
                numbers += used * module.weight.shape[-2]
        return tile_tokens(numbers, on_gpu())


class _Call(NamedTuple):
    """A module's input and output in the trial: `[1, T, D]` each."""

    x: mx.array
    out: mx.array


def _recorded_calls(model: nn.Module) -> dict[int, _Call]:
    """Calls by module id, for modules in layers that hold several products and are called only with tokens' vectors.

    Recorded in a forward pass on `TRIED`, which is not evaluated. (The pass has no cache, so a module cannot mix tokens
    by remembering earlier calls.)
    """
    calls: dict[int, list[_Call | None]] = {}

    def call(self: Any, plain: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        single = len(args) == 1 and not kwargs and all(_is_vectors(array) for array in (*args, out))
        calls.setdefault(id(self), []).append(_Call(args[0], out) if single else None)
        return out

    several = [m for layer in model.layers for m in layer.modules() if m is not layer and _products(m) > 1]
    formers = [type(module) for module in several]
    try:
        for module, former in zip(several, formers, strict=True):
            module.__class__ = _recording(former, call)
        model(TRIED, cache=None)
    finally:
        for module, former in zip(several, formers, strict=True):
            module.__class__ = former
    return {place: found[0] for place, found in calls.items() if len(found) == 1 and found[0] is not None}


def _recording(kind: type, call: Any) -> type:
    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, lambda *a, **k: kind.__call__(self, *a, **k), *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": record})


def _products(module: nn.Module) -> int:
    return sum(isinstance(inner, LINEAR) for inner in module.modules())


def _is_vectors(array: Any) -> bool:
    return isinstance(array, mx.array) and array.ndim == 3 and array.shape[:2] == TRIED.shape


def _drops_by_place(part: nn.Module) -> bool:
    """Whether dropout sees tokens in a different order than the sequence's, because experts sort them."""
    modules = part.modules()
    return any(isinstance(m, LoRADropout) for m in modules) and any(isinstance(m, EXPERTS) for m in modules)


class _InTiles:
    """Mixin before a row-wise part's class: computes the part in tiles of `tile` tokens."""

    tile: int

    def __call__(self: Any, x: mx.array) -> mx.array:
        plain = super().__call__  # type: ignore[misc]  # the part's class
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < PAYING * self.tile:
            out: mx.array = plain(x)
            return out
        key, now = dropout_key(), as_now()  # the backward pass runs later, with others or none

        def of_tile(first: int, own: mx.array) -> tuple[mx.array]:
            with dropping(key, first), now():
                return (plain(own[None])[0],)

        (found,) = in_pieces(of_tile, rows, self.tile, self, self.trainable_parameters())
        return found.reshape(*x.shape[:-1], found.shape[-1])
