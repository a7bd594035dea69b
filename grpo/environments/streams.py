"""Random numbers of a seat's own: what it draws does not depend on what other seats draw at the same time.

Many seats live in one process, and their code draws by `random.randint`, `numpy.random.rand` and the like, of which a
process has one stream. Once `install` was called, these functions draw from the stream of the seat that calls them.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any


class Streams:
    """The streams of one seat, as `random.seed(seed)` and `numpy.random.seed(seed % 2**32)` begin them.

    The first seed is 0: objects serve any row, so all are made with the same numbers.
    """

    def __init__(self) -> None:
        import numpy

        self.random = random.Random(0)
        self.numpy = numpy.random.RandomState(0)

    def seed(self, seed: int) -> None:
        self.random.seed(seed)
        self.numpy.seed(seed % 2**32)


CURRENT: ContextVar[Streams | None] = ContextVar("streams of the seat", default=None)
"""The streams of the seat whose code runs. Its thread sets it, and its asynchronous calls inherit it."""


@functools.cache
def install() -> None:
    """Let the functions of `random` and `numpy.random` draw from the current seat's streams; elsewhere as before.

    Call it before code is imported that says `from random import randint`: names that were bound earlier still mean the
    process's stream.
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
    """The names in a module that are methods of one object."""
    return [name for name, value in vars(module).items() if getattr(value, "__self__", None) is owner]


def _dispatching(method: str, original: Callable[..., Any], own: Callable[[Streams], Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        streams = CURRENT.get()
        return (original if streams is None else getattr(own(streams), method))(*args, **kwargs)

    return drawn
