"""Separate random streams per seat: what a seat draws does not depend on what other seats draw at the same time.

Many seats share a process, and their code calls `random.randint`, `numpy.random.rand` and the like, which use one
stream per process. After `install`, these functions draw from the stream of the seat that calls them.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any


class Streams:
    """The streams of one seat, seeded as by `random.seed(seed)` and `numpy.random.seed(seed % 2**32)`.

    The first seed is 0. An object serves any row, so every object is created with the same random numbers.
    """

    def __init__(self) -> None:
        import numpy

        self.random = random.Random(0)
        self.numpy = numpy.random.RandomState(0)

    def seed(self, seed: int) -> None:
        self.random.seed(seed)
        self.numpy.seed(seed % 2**32)


CURRENT: ContextVar[Streams | None] = ContextVar("streams of the seat", default=None)
"""The streams of the seat whose code is running. The seat's thread sets it, and its asynchronous calls inherit it."""


@functools.cache
def install() -> None:
    """Make the functions of `random` and `numpy.random` draw from the current seat's streams.

    Outside a seat they draw from the process's stream as before. Call this before importing code that does
    `from random import randint`: names that were bound earlier keep using the process's stream.
    """
    import numpy

    shared, rand = random._inst, numpy.random.mtrand._rand
    for name in _methods_of(shared, random):
        setattr(random, name, _dispatching(name, getattr(random, name), lambda streams: streams.random))
    renamed = {"seed": "seed", "ranf": "random_sample", "sample": "random_sample"}  # functions that call a method
    for name in {*_methods_of(rand, numpy.random), *renamed}:
        method, original = renamed.get(name, name), getattr(numpy.random, name)
        setattr(numpy.random, name, _dispatching(method, original, lambda streams: streams.numpy))


def _methods_of(owner: Any, module: Any) -> list[str]:
    """Names in `module` that are bound methods of `owner`."""
    return [name for name, value in vars(module).items() if getattr(value, "__self__", None) is owner]


def _dispatching(method: str, original: Callable[..., Any], own: Callable[[Streams], Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        streams = CURRENT.get()
        return (original if streams is None else getattr(own(streams), method))(*args, **kwargs)

    return drawn
