"""Passes through a divided model: each module is gathered from the processes' parts when it is used.

All processes must gather in the same order. A gathered array does not depend on earlier results, so MLX could choose
any order; here each exchange waits for the one traced before it. So exchanges happen in the order in which the model is
traced, whatever the shapes of a process's micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from grpo.model.offloading import Checkpoint, filled, leaves
from grpo.model.parts import ArrayPlace, Parts


class Gathering:
    """Gathers the arrays of modules. `places` are the divided arrays by the module's id."""

    def __init__(self, parts: Parts, places: Mapping[int, list[ArrayPlace]]) -> None:
        self._parts, self._places = parts, places
        self._scatters: bool | None = None
        self._used: set[int] = set()
        self._last: list[mx.array] = []
        """The arrays that the next exchange waits for."""

    def begin(self) -> None:
        """Call this before a gradient, and after it has been traced: later exchanges do not wait for earlier ones."""
        self._last = []

    def used(self, module: nn.Module, function: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """`function(x)`, with a module outside the layers gathered."""
        if id(module) in self._used:
            return function(x)
        with self._whole([module], self._places[id(module)], [x, *self._last]):
            made = function(x)
        self._last = [made]
        return made

    def checkpoint(self, *modules: nn.Module) -> Checkpoint:
        """Like `mx.checkpoint`, for functions of parameters, `x` and further arguments, with these modules gathered.

        In the backward pass the modules are gathered after all earlier exchanges, and later exchanges wait for their
        gradients.
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
            ready: Any = mx.depends([x, *leaves(given)], [*slopes, *self._last])
            x, arrays = ready[0], ready[1:]
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
        self, modules: Sequence[nn.Module], places: Sequence[ArrayPlace], after: Sequence[mx.array]
    ) -> Iterator[list[mx.array]]:
        """Inside the block the arrays in these places are whole, and `used` does not gather these modules again. They
        are gathered when `after` is computed. Yields the arrays that the next exchange waits for."""
        former, marked = [(place, place.array) for place in places], {id(module) for module in modules}
        waits = [mx.stop_gradient(array) for array in after]
        self._used |= marked
        try:
            for place, part in former:
                place.put(whole := self._gathered(part, place, waits))
                waits = _first(whole)
            yield waits
        finally:
            self._used -= marked
            for place, part in former:
                place.put(part)

    def _all_whole(self, parameters: Any, of_leaves: Sequence[ArrayPlace | None], waits: list[mx.array]) -> Any:
        """The tree with whole arrays instead of parts."""
        arrays = leaves(parameters)
        for number, place in enumerate(of_leaves):
            if place is not None:
                arrays[number] = self._gathered(arrays[number], place, waits)
                waits = _first(arrays[number])
        return filled(parameters, arrays)

    def _gathered(self, part: mx.array, place: ArrayPlace, after: list[mx.array]) -> mx.array:
        @mx.custom_function
        def whole(part: mx.array) -> mx.array:
            return self._all_gathered(part)[: place.size].reshape(place.shape)

        @whole.vjp
        def slope(_: mx.array, of_whole: mx.array, __: mx.array) -> mx.array:
            return self._summed_part(of_whole)

        found: Any = whole(_waiting(part, after))
        return cast(mx.array, found)

    def _all_gathered(self, part: mx.array) -> mx.array:
        if self._parts.is_silent:
            return mx.concatenate([part] * self._parts.ranks.size)
        return mx.distributed.all_gather(part, group=self._parts.ranks.group)

    def _summed_part(self, slope: mx.array) -> mx.array:
        """This process's part of a gradient summed over the processes, float32."""
        length = self._parts.length(slope.size)
        flat = slope.reshape(-1).astype(mx.float32)
        flat = _waiting(mx.pad(flat, (0, length * self._parts.ranks.size - flat.size)), self._last)
        own = slice(self._parts.ranks.rank * length, (self._parts.ranks.rank + 1) * length)
        if self._parts.is_silent:
            part = mx.contiguous(flat[own])
        elif self._can_scatter():
            part = mx.distributed.sum_scatter(flat, group=self._parts.ranks.group)
        else:
            part = mx.contiguous(mx.distributed.all_sum(flat, group=self._parts.ranks.group)[own])
        self._last = [part]
        return part

    def _can_scatter(self) -> bool:
        """Whether the backend has `sum_scatter`. MLX's ring, mpi and jaccl do not, and raise an error of their own."""
        if self._scatters is None:
            try:
                mx.eval(mx.distributed.sum_scatter(mx.zeros(self._parts.ranks.size), group=self._parts.ranks.group))
                self._scatters = True
            except RuntimeError as error:
                if "sum_scatter not" not in str(error):
                    raise
                self._scatters = False
        return self._scatters


class Gathered:
    """Mixin before the class of an embedding or a head: gathers the module when it is called, unless it is whole."""

    of: Gathering

    def __call__(self: Any, x: mx.array) -> mx.array:
        return self.of.used(self, super().__call__, x)  # type: ignore[misc, no-any-return]  # the module's class

    def as_linear(self: Any, x: mx.array) -> mx.array:
        return self.of.used(self, super().as_linear, x)  # type: ignore[misc, no-any-return]  # the module's class


def _first(whole: mx.array) -> list[mx.array]:
    """One number of an array, for the next exchange to wait for."""
    return [mx.stop_gradient(whole.reshape(-1)[:1])]


def _waiting(array: mx.array, after: Sequence[mx.array]) -> mx.array:
    """The array, computed only after the arrays of `after`."""
    return mx.depends([array], list(after))[0] if after else array
