"""Fully sharded data parallelism: during an update each process holds a part of every large array (arXiv 1910.02054,
ZeRO-3; arXiv 2304.11277).

During rollouts and evaluation the weights are whole, and each process decodes independently. During an update a process
holds only its parts. A layer is gathered when it is computed and freed afterwards, and gathered again in the backward
pass, which recomputes it. In full training, each gradient is summed over the processes as soon as it exists, and each
process keeps its part of the sum and of the optimizer's state.

`mlx.nn.fully_shard` divides modules in the same way, but does not fit: it wraps each module, which changes the paths of
all parameters; it divides adapters and averages their gradients; it needs first axes that the number of processes
divides; gathered arrays stay until the backward pass; and it does not fix the order in which layers are gathered, which
must be the same in all processes, whatever the shapes of their micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend.ranks import Ranks
from grpo.model.adapters import Adapters
from grpo.model.checkpointing import checkpointed
from grpo.model.gathering import Gathered, Gathering
from grpo.model.head import Head, head_parameters, talking
from grpo.model.offloading import Checkpoint
from grpo.model.parts import ArrayPlace, FlatShards, Parts, places_below
from grpo.model.quantized import dtype_of
from grpo.model.standins import put_before

SUMMED = 8
"""Bytes per number of a gradient that is summed over processes: the sum's input and output, both in float32."""
ENDS = (nn.Embedding, nn.QuantizedEmbedding, nn.Linear, nn.QuantizedLinear)
"""Classes of the modules outside the layers that are divided. Others stay whole, because their use is unknown."""


class Spread:
    """A model's large arrays, spread over the processes of `ranks` while `is_on`.

    Parts are flat: one-dimensional, with the same length in all processes, padded with zeros at the end. All processes
    must begin and end together, and make the same number of passes through the model in between.
    """

    def __init__(
        self, model: nn.Module, adapters: Adapters | None, head: Head | None, ranks: Ranks, copies: Ranks
    ) -> None:
        """`head` is the model's head, if it is called separately. `ranks` share the arrays, and `copies` are the
        processes that hold the same parts in other groups. Nothing is evaluated or exchanged.

        For a model's outline, `adapters` is None, and nothing is ever evaluated.
        """
        self.model, self.adapters = model, adapters
        self.is_on = False
        self._parts = Parts(ranks, copies)
        layers = [(layer, places_below(layer)) for layer in model.layers]
        inside = {id(module) for layer in model.layers for module in layer.modules()}
        outside = [module for module in model.modules() if isinstance(module, ENDS) and id(module) not in inside]
        self._ends = [module for module in outside if places_below(module)]
        self._places = {id(module): places for module, places in (*layers, *((m, places_below(m)) for m in self._ends))}
        linear = [module for module in self._ends if isinstance(module, nn.Linear | nn.QuantizedLinear)]
        self._head = (linear or self._ends if adapters is None else []) if head is None else self._read_by(head)
        for places in self._places.values():
            for place in places:
                place.holder.spread = True  # decoders then keep no reference to a weight that is to be freed
        model.spread = True
        held = {(id(place.holder), place.name): place for place in self._each()}
        trained = tree_flatten(model.trainable_parameters())
        found = {path: held.get(_holder(model, path)) for path, _ in trained}
        self._gathering = Gathering(self._parts, self._places)
        self.shards = FlatShards(self._parts, {path: place for path, place in found.items() if place is not None})

    def _each(self) -> Iterator[ArrayPlace]:
        seen: set[tuple[int, str]] = set()
        for places in self._places.values():
            for place in places:
                if (key := (id(place.holder), place.name)) not in seen:
                    seen.add(key)
                    yield place

    def _read_by(self, head: Head) -> list[nn.Module]:
        """The modules outside the layers that the head reads, found by a trial that evaluates nothing."""
        called: list[nn.Module] = []

        class Recorder:
            def __call__(self: Any, x: mx.array) -> mx.array:
                called.append(self)
                return super().__call__(x)  # type: ignore[misc, no-any-return]  # the module's class

            def as_linear(self: Any, x: mx.array) -> mx.array:
                called.append(self)
                return super().as_linear(x)  # type: ignore[misc, no-any-return]  # the module's class

        with put_before(self._ends, Recorder):
            head(mx.zeros((1, 1, int(talking(self.model).args.hidden_size)), dtype_of(self.model)))
        return called

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Inside the block this process holds only its parts. After an error in the block the model stays divided,
        because the other processes might not take part in gathering it."""
        self.divide()
        yield
        self.gather()

    def divide(self) -> None:
        """Free everything except this process's parts. Nothing is exchanged."""
        if self.is_on:
            return
        for place in self._each():
            place.put(self._computed(self._parts.part_of(place.array)))
        self._change_parked(lambda path, array: self._computed(self.shards.part_of(path, array)))
        self.is_on = True

    def gather(self) -> None:
        """Restore the whole arrays. All processes must call this."""
        if not self.is_on:
            return
        for place in self._each():
            place.put(self._parts.joined(place.array, place))
        self._change_parked(self.shards.whole_of)
        self.is_on = False

    def _change_parked(self, change: Callable[[str, mx.array], mx.array]) -> None:
        """Apply `change` to the inactive states, such as the reference in full training."""
        if self.adapters is None or not self.shards.places:
            return
        for name in self.adapters.names:
            if name != self.adapters.active:
                state = self.adapters.state(name)
                self.adapters.add(name, {path: change(path, state.pop(path)) for path in list(state)})

    def _computed(self, array: mx.array) -> mx.array:
        if self.adapters is not None:
            mx.eval(array)
        return array

    @property
    def at_work(self) -> tuple[int, int]:
        """Bytes of arrays that are whole while they are used: in the largest layer, and in the modules that the head
        reads. Counts the gradients of trained arrays in the backward pass, with the float32 copies for their sums."""
        trained = {id(place) for place in self.shards.places.values()}
        layers = [self._places[id(layer)] for layer in self.model.layers]
        ends = [place for module in self._head for place in self._places[id(module)]]
        return max((_bytes(places, trained) for places in layers), default=0), _bytes(ends, trained)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Inside the block this process holds its parts and exchanges nothing: results are meaningless, but take as
        much memory as real ones, so each process can measure independently. Afterwards the former arrays are restored.
        """
        former = [(place, place.array) for place in self._each()]
        states = None if self.adapters is None else self.adapters.snapshot()
        self._parts.is_silent = True
        self.divide()
        try:
            yield
        finally:
            for place, array in former:
                place.put(array)
            if self.adapters is not None and states is not None:
                self.adapters.restore(states)
            self.is_on = self._parts.is_silent = False

    def begin(self) -> None:
        """Call this before a gradient, and after it has been traced."""
        self._gathering.begin()

    @contextmanager
    def through(self) -> Iterator[None]:
        """Inside the block, embeddings and heads that the model calls are gathered for each use."""
        if not self.is_on:
            yield
            return
        with put_before(self._ends, Gathered, {"of": self._gathering}):
            yield

    def through_head(self, function: Callable[[mx.array], tuple[mx.array, ...]], hidden: mx.array) -> Any:
        """`function(hidden)`, with the head gathered once, and once more in the backward pass, however often
        `function` calls it."""
        trained = head_parameters(self.model)
        return checkpointed(self.model, trained, function, self.checkpoint(*self._head))(hidden)

    def checkpoint(self, *modules: nn.Module) -> Checkpoint:
        """The checkpoint function for code that uses these modules. See `Gathering`."""
        return self._gathering.checkpoint(*modules)


def is_spread(model: nn.Module) -> bool:
    """Whether the model's weights are spread over processes during an update."""
    return bool(getattr(model, "spread", False))


def _bytes(places: Sequence[ArrayPlace], trained: set[int]) -> int:
    whole = sum(place.size * place.array.itemsize for place in places)
    return whole + sum(place.size * (place.array.itemsize + SUMMED) for place in places if id(place) in trained)


def _holder(model: nn.Module, path: str) -> tuple[int, str]:
    *parents, name = path.split(".")
    holder: Any = model
    for parent in parents:
        holder = holder[int(parent) if isinstance(holder, list) else parent]
    return id(holder), name
