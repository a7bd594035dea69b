"""Fully sharded data parallel: between uses each process keeps a part of every large array (arXiv 1910.02054, ZeRO-3;
arXiv 2304.11277).

During the rollout and evaluation the weights are whole, and each process decodes by itself. During an update a process
keeps its parts alone. A layer is gathered when it is computed and let go after it, and gathered again in the backward
pass, which computes it again. Where whole weights train, a gradient is summed over the processes as it appears, and each
keeps its own part of the sum, and of the optimizer's state.

`mlx.nn.fully_shard` divides modules in the same way, and does not do for this: it puts a module in front of each, which
changes the paths of all parameters; it divides adapters and averages their gradients; it wants first axes that the
number of processes divides; what it gathers stays until the backward pass; and it does not say in which order layers are
gathered, which must be the same in all processes, whatever the shapes of their micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend.ranks import Ranks
from grpo.model.adapters import Adapters
from grpo.model.checkpointing import checkpointed
from grpo.model.head import Head, head_parameters, talking
from grpo.model.offloading import Checkpoint, filled, leaves
from grpo.model.quantized import dtype_of
from grpo.model.shards import PRECISE, Shards
from grpo.model.standins import put_before

LEAST = 2**12
"""Numbers of an array that is divided; smaller ones (norms, biases) are whole in every process."""
ALIGNED = 256
"""Parts have a multiple of so many numbers: 8-bit moments have a scale for each 256, and no two processes share one."""
ENDS = (nn.Embedding, nn.QuantizedEmbedding, nn.Linear, nn.QuantizedLinear)
"""Modules outside the layers that are divided. Whatever else is there stays whole: nobody knows how it is used."""
ADAPTERS = "lora_a", "lora_b", "m"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a divided array is held, and what the whole is."""

    holder: Any
    name: str
    shape: tuple[int, ...]
    size: int

    @property
    def array(self) -> mx.array:
        held: mx.array = self.holder[self.name]
        return held

    def put(self, array: mx.array) -> None:
        self.holder[self.name] = array


class Spread:
    """A model's large arrays, spread over the processes of `ranks` while it `is_on`.

    Parts are flat: one-dimensional, of the same length in all processes, with zeros behind the last numbers. All
    processes must begin and end together, and make as many passes through the model in between.
    """

    def __init__(self, model: nn.Module, adapters: Adapters, head: Head | None, ranks: Ranks, copies: Ranks) -> None:
        """`head` is the model's, where it is called by itself. `ranks` have the arrays together, and `copies` are those
        that have the same parts in other such groups. Nothing is computed or exchanged."""
        self.model, self.adapters, self.ranks, self.copies = model, adapters, ranks, copies
        self.is_on = False
        self._silent = False
        self._scatters: bool | None = None
        self._last: list[mx.array] = []
        """What the next exchange waits for: the order in which this is traced is the order of exchanges."""
        self._used: set[int] = set()
        layers = [(layer, _places(layer)) for layer in model.layers]
        inside = {id(module) for layer in model.layers for module in layer.modules()}
        outside = [module for module in model.modules() if isinstance(module, ENDS) and id(module) not in inside]
        self._ends = [module for module in outside if _places(module)]
        self._places = {id(module): places for module, places in (*layers, *((m, _places(m)) for m in self._ends))}
        self._head = [] if head is None else self._read_by(head)
        for places in self._places.values():
            for place in places:
                place.holder.spread = True  # decoders hold no weight that is let go of
        held = {(id(place.holder), place.name): place for place in self._each()}
        trained = tree_flatten(model.trainable_parameters())
        found = {path: held.get(_holder(model, path)) for path, _ in trained}
        self.shards = FlatShards(self, {path: place for path, place in found.items() if place is not None})

    def _each(self) -> Iterator[Place]:
        seen: set[tuple[int, str]] = set()
        for places in self._places.values():
            for place in places:
                if (key := (id(place.holder), place.name)) not in seen:
                    seen.add(key)
                    yield place

    def _read_by(self, head: Head) -> list[nn.Module]:
        """The modules outside the layers that the head reads, by a trial that computes nothing."""
        asked: list[nn.Module] = []

        class Asked:
            def __call__(self: Any, x: mx.array) -> mx.array:
                asked.append(self)
                return super().__call__(x)  # type: ignore[misc, no-any-return]  # the module's own

            def as_linear(self: Any, x: mx.array) -> mx.array:
                asked.append(self)
                return super().as_linear(x)  # type: ignore[misc, no-any-return]  # the module's own

        with put_before(self._ends, Asked):
            head(mx.zeros((1, 1, int(talking(self.model).args.hidden_size)), dtype_of(self.model)))
        return asked

    # Parts and wholes.

    def part_of(self, array: mx.array) -> mx.array:
        """This process's part of a whole array, not yet computed."""
        length = self.length(array.size)
        start = min(self.ranks.rank * length, array.size)
        own = array.reshape(-1)[start : start + length]
        return mx.contiguous(mx.pad(own, (0, length - own.size)) if own.size < length else own)

    def length(self, size: int) -> int:
        """Numbers in a part of an array of so many."""
        return -(-size // (self.ranks.size * ALIGNED)) * ALIGNED

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Inside the block this process holds its parts alone. After an error in it the model stays so: nobody knows
        whether the others come to gather it."""
        self.divide()
        yield
        self.gather()

    def divide(self) -> None:
        """Let go of all but this process's parts. Nothing is exchanged."""
        if self.is_on:
            return
        for place in self._each():
            place.put(self._computed(self.part_of(place.array)))
        self.adapters.change_parked(lambda path, array: self._computed(self.shards.part_of(path, array)))
        self.is_on = True
        mx.clear_cache()

    def gather(self) -> None:
        """Have the whole arrays again. All processes must."""
        if not self.is_on:
            return
        for place in self._each():
            place.put(self.joined(place.array, place))
        self.adapters.change_parked(self.shards.whole_of)
        self.is_on, self._last = False, []
        mx.clear_cache()

    def joined(self, part: mx.array, place: Place) -> mx.array:
        """The whole of everybody's parts, computed."""
        return self._computed(self.ranks.join(part, 0)[: place.size].reshape(place.shape))

    def _computed(self, array: mx.array) -> mx.array:
        mx.eval(array)
        return array

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Inside the block this process holds parts and exchanges nothing: what is computed there means nothing, but
        takes as much memory. Each process can measure by itself. Afterwards the very arrays from before are back."""
        former = [(place, place.array) for place in self._each()]
        states = self.adapters.snapshot()
        self._silent = True
        self.divide()
        try:
            yield
        finally:
            for place, array in former:
                place.put(array)
            self.adapters.restore(states)
            self.is_on = self._silent = False
            self._last = []

    # Passes through the model.

    def begin(self) -> None:
        """A new gradient begins: nothing was exchanged for it yet."""
        self._last = []

    @contextmanager
    def through(self) -> Iterator[None]:
        """Inside the block embeddings are gathered for each use, and so are heads that are called by the model."""
        if not self.is_on:
            yield
            return
        with put_before(self._ends, _End, {"of": self}):
            yield

    def used(self, module: nn.Module, function: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """`function(x)` with a module outside the layers whole."""
        if id(module) in self._used:
            return function(x)
        with self._whole([module], self._places[id(module)], [x, *self._last]):
            made = function(x)
        self._last = [made]
        return made

    def through_head(self, function: Callable[[mx.array], tuple[mx.array, ...]], hidden: mx.array) -> Any:
        """`function(hidden)`, which calls the head as often as it likes: the head is gathered once, and once more in
        the backward pass."""
        trained = head_parameters(self.model)
        return checkpointed(self.model, trained, function, self.checkpoint(*self._head))(hidden)

    def checkpoint(self, *modules: nn.Module) -> Checkpoint:
        """As `mx.checkpoint`, for functions of parameters, `x`, and anything more, which use these modules whole.

        In the backward pass they are gathered when all that was exchanged before is done, and what comes after waits
        for their gradients.
        """
        return lambda function: lambda parameters, x, *rest: self._once(modules, function, parameters, x, rest)

    def _once(
        self, modules: Sequence[nn.Module], function: Callable[..., Any], parameters: Any, x: mx.array, rest: Any
    ) -> Any:
        places = {id(place.array): place for module in modules for place in self._places[id(module)]}
        of_leaves = [places.pop(id(leaf), None) for leaf in leaves(parameters)]
        frozen = list(places.values())

        @mx.custom_function
        def forward(x: mx.array, given: Any) -> Any:
            parameters, rest = given
            with self._whole(modules, frozen, [x]) as waits:
                return function(self._all_whole(parameters, of_leaves, waits), x, *rest)

        @forward.vjp
        def backward(primals: Any, cotangents: Any, _: Any) -> Any:
            x, given = primals
            slopes = leaves(cotangents)
            x, *arrays = mx.depends([x, *leaves(given)], [*slopes, *self._last])
            parameters, rest = filled(given, arrays)

            def again(x: mx.array, *arrays: mx.array) -> list[mx.array]:
                parameters, rest = filled(given, arrays)
                return leaves(function(parameters, x, *rest))

            with self._whole(modules, frozen, [x]) as waits:  # in the backward pass of `again`, too
                parameters = self._all_whole(parameters, of_leaves, waits)
                _, (of_x, *others) = mx.vjp(again, [x, *leaves((parameters, rest))], slopes)
            self._last = []
            for number, place in enumerate(of_leaves):
                if place is not None:
                    others[number] = self._summed_part(others[number])
            self._last = [_waiting(of_x, self._last)]
            return self._last[0], filled(given, others)

        made = forward(_waiting(x, [mx.stop_gradient(array) for array in self._last]), (parameters, rest))
        self._last = leaves(made)[:1]
        return made

    @contextmanager
    def _whole(
        self, modules: Sequence[nn.Module], places: Sequence[Place], after: Sequence[mx.array]
    ) -> Iterator[list[mx.array]]:
        """Inside the block these modules count as whole, and the arrays in these places are: gathered when `after` is
        computed. Yields what the next exchange waits for."""
        former, asked = [(place, place.array) for place in places], {id(module) for module in modules}
        waits = [mx.stop_gradient(array) for array in after]
        self._used |= asked
        try:
            for place, part in former:
                place.put(whole := self._gathered(part, place, waits))
                waits = _first(whole)
            yield waits
        finally:
            self._used -= asked
            for place, part in former:
                place.put(part)

    def _all_whole(self, parameters: Any, of_leaves: Sequence[Place | None], waits: list[mx.array]) -> Any:
        """The tree with whole arrays in the place of parts."""
        arrays = leaves(parameters)
        for number, place in enumerate(of_leaves):
            if place is not None:
                arrays[number] = self._gathered(arrays[number], place, waits)
                waits = _first(arrays[number])
        return filled(parameters, arrays)

    # Exchanges.

    def _gathered(self, part: mx.array, place: Place, after: list[mx.array]) -> mx.array:
        @mx.custom_function
        def whole(part: mx.array) -> mx.array:
            return self._all_gathered(part)[: place.size].reshape(place.shape)

        @whole.vjp
        def slope(_: mx.array, of_whole: mx.array, __: mx.array) -> mx.array:
            return self._summed_part(of_whole)

        found: mx.array = whole(_waiting(part, after))
        return found

    def _all_gathered(self, part: mx.array) -> mx.array:
        if self._silent:
            return mx.concatenate([part] * self.ranks.size)
        return mx.distributed.all_gather(part, group=self.ranks.group)

    def _summed_part(self, slope: mx.array) -> mx.array:
        """This process's part of a gradient's sum over the processes, float32."""
        length = self.length(slope.size)
        flat = slope.reshape(-1).astype(mx.float32)
        flat = _waiting(mx.pad(flat, (0, length * self.ranks.size - flat.size)), self._last)
        own = slice(self.ranks.rank * length, (self.ranks.rank + 1) * length)
        if self._silent:
            part = mx.contiguous(flat[own])
        elif self._can_scatter():
            part = mx.distributed.sum_scatter(flat, group=self.ranks.group)
        else:
            part = mx.contiguous(mx.distributed.all_sum(flat, group=self.ranks.group)[own])
        self._last = [part]
        return part

    def _can_scatter(self) -> bool:
        """Whether the backend sums and divides at once: MLX's ring sums alone."""
        if self._scatters is None:
            try:
                mx.eval(mx.distributed.sum_scatter(mx.zeros(self.ranks.size), group=self.ranks.group))
                self._scatters = True
            except RuntimeError as error:
                if "not supported" not in str(error):
                    raise
                self._scatters = False
        return self._scatters


class FlatShards(Shards):
    """Which of the arrays that train are parts while they are spread: of these, gradient and optimizer's state are
    parts all the time."""

    def __init__(self, spread: Spread, places: Mapping[str, Place]) -> None:
        super().__init__()
        self._spread, self.places = spread, dict(places)
        if self.places:
            self.ranks = spread.ranks

    def divides(self, path: str) -> bool:
        return self._base(path) is not None

    def sums_of(self, paths: Iterable[str], ranks: Ranks) -> list[tuple[list[str], Ranks]]:
        parts = [path for path in paths if self.divides(path)]
        return [(parts, self._spread.copies), ([path for path in paths if path not in set(parts)], ranks)]

    def whole(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        return {path: self.whole_of(path, array) for path, array in arrays.items()}

    def part_of(self, path: str, array: mx.array) -> mx.array:
        if self._base(path) is None or not array.ndim:
            return array
        if path.endswith(".scales"):
            length = self._spread.length(self.places[self._base(path) or ""].size) // ALIGNED
            padded = mx.pad(array, (0, length * self.ranks.size - array.size))
            return mx.contiguous(padded[self.ranks.rank * length : (self.ranks.rank + 1) * length])
        return self._spread.part_of(array)

    def whole_of(self, path: str, array: mx.array) -> mx.array:
        """The whole of everybody's parts; of what is whole, itself."""
        base = self._base(path)
        if base is None or not array.ndim:
            return array
        place = self.places[base]
        if array.shape == place.shape:
            return array
        if path.endswith(".scales"):
            return self.ranks.join(array, 0)[: -(-place.size // ALIGNED)]
        return self._spread.joined(array, place)

    def _base(self, path: str) -> str | None:
        """The path of what trains, of that or of the name of what an optimizer keeps of it."""
        path = path.removeprefix(PRECISE)
        for _ in range(3):  # `weight`, `weight.m`, and `weight.m.codes`
            if path in self.places:
                return path
            path = path.rpartition(".")[0]
        return None


class _End:
    """Put before the class of an embedding or a head: it is gathered when it is called, unless it is whole."""

    of: Spread

    def __call__(self: Any, x: mx.array) -> mx.array:
        return self.of.used(self, super().__call__, x)  # type: ignore[misc, no-any-return]  # the module's own

    def as_linear(self: Any, x: mx.array) -> mx.array:
        return self.of.used(self, super().as_linear, x)  # type: ignore[misc, no-any-return]  # the module's own


def _places(module: nn.Module) -> list[Place]:
    """The arrays below a module that are divided."""
    return [
        Place(inner, name, tuple(array.shape), array.size)
        for inner in module.modules()
        for name, array in inner.items()
        if isinstance(array, mx.array) and array.size >= LEAST and name not in ADAPTERS
    ]


def _holder(model: nn.Module, path: str) -> tuple[int, str]:
    *parents, name = path.split(".")
    holder: Any = model
    for parent in parents:
        holder = holder[int(parent) if isinstance(holder, list) else parent]
    return id(holder), name


def _first(whole: mx.array) -> list[mx.array]:
    """A number of an array, for the next to wait for."""
    return [mx.stop_gradient(whole.reshape(-1)[:1])]


def _waiting(array: mx.array, after: Sequence[mx.array]) -> mx.array:
    """The array, computed when these are."""
    return mx.depends([array], list(after))[0] if after else array


