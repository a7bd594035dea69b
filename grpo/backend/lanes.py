"""Lanes: streams of a CPU that compute side by side, each with its share of the cores.

On a CPU MLX uses several cores for large matrix products alone, and one core for everything else. So work that falls
into independent parts goes through several streams at once. What comes out does not depend on how many there are, nor
on which of them is faster: a part is computed by one lane, and results are handed back in the order of the parts.

The caller's thread builds the graphs and a thread for each lane evaluates them, while Python builds the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import mlx.core as mx

from grpo.backend import blas
from grpo.backend.device import cpu_cores, on_gpu
from grpo.backend.ranks import Ranks

Item = TypeVar("Item")
Made = TypeVar("Made")


def lanes_for(parts: int, ranks: Ranks | None = None) -> int:
    """How many lanes pay for so many independent parts: one on a GPU, and on a CPU one for each core at most.

    Several processes on one machine share its cores evenly. All `ranks` must ask.
    """
    return 1 if on_gpu() else max(1, min(parts, _cores(ranks)))


def _cores(ranks: Ranks | None) -> int:
    return cpu_cores() // (ranks.neighbours if ranks else 1)


class Lanes:
    """Streams of a CPU, and the threads that evaluate on them: made when they are first needed."""

    def __init__(self) -> None:
        self._streams: list[mx.Stream] = []
        self._threads: ThreadPoolExecutor | None = None

    def each(
        self, build: Callable[[Item], Made], items: Sequence[Item], number: int, state: Any = None
    ) -> Iterator[Made]:
        """Yield `build(item)`, arrays or a tree of them, evaluated, for each item in order, by so many lanes.

        `state` is a tree of arrays that several graphs read. It is evaluated first, as items are, because two lanes
        must not compute the same array.
        """
        mx.eval(state, items)
        with blas.threads(max(1, blas.most_threads() // number)):
            yield from self._side_by_side(build, items, number)

    def _side_by_side(self, build: Callable[[Item], Made], items: Sequence[Item], number: int) -> Iterator[Made]:
        threads, streams = self._open(number)
        under_way: deque[tuple[Future[None], Made, mx.Stream]] = deque()
        try:
            for item in items:
                stream = streams[len(under_way)] if len(under_way) < number else None
                if stream is None:
                    evaluated, made, stream = under_way.popleft()
                    evaluated.result()
                    yield made
                    del made
                with mx.stream(stream):
                    graph = build(item)
                under_way.append((threads.submit(mx.eval, graph), graph, stream))
                del graph
            while under_way:
                evaluated, made, _ = under_way.popleft()
                evaluated.result()
                yield made
        finally:
            wait([evaluated for evaluated, _, _ in under_way])  # after an error too: nothing goes on behind the caller

    def _open(self, number: int) -> tuple[ThreadPoolExecutor, list[mx.Stream]]:
        while len(self._streams) < number:
            self._streams.append(mx.new_thread_unsafe_stream(mx.cpu))  # built in one thread and evaluated in another
        if self._threads is None:
            self._threads = ThreadPoolExecutor(cpu_cores(), thread_name_prefix="lane")
        return self._threads, self._streams
