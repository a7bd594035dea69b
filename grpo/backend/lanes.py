"""Lanes: CPU streams that compute in parallel, each with its share of the cores.

On a CPU, MLX uses several cores only for large matrix products, and one core for everything else. So independent parts
of work run on several streams in parallel. Results depend neither on the number of lanes nor on their speed: one lane
computes a part, and results are returned in the order of the parts.

The caller's thread builds the graphs. One thread per lane evaluates them while Python builds the next graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

import mlx.core as mx

from grpo.backend import blas
from grpo.backend.device import cpu_cores, on_gpu
from grpo.backend.ranks import Ranks

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def lanes_for(parts: int, ranks: Ranks | None = None) -> int:
    """The number of lanes for this many independent parts: one on a GPU; on a CPU at most one per core.

    Several processes on one machine share its cores evenly.
    """
    return 1 if on_gpu() else max(1, min(parts, own_cores(ranks.neighbours if ranks else 1)))


def own_cores(neighbours: int) -> int:
    """This process's share of the cores, with `neighbours` processes on this machine (`Ranks.neighbours`)."""
    return cpu_cores() // neighbours


def side_by_side(
    build: Callable[[_Item], _Made], items: Sequence[_Item], number: int, state: Any = None
) -> Iterator[_Made]:
    """Yield `build(item)`, an evaluated array or tree of arrays, for each item in order, on `number` lanes.

    With one lane, each result is evaluated before the next is built. `state` is a tree of arrays that several graphs
    read. It is evaluated first, like the items, because two lanes must not compute the same array.
    """
    if number == 1:
        for item in items:
            made = build(item)
            mx.eval(made)
            yield made
        return
    mx.eval(state, items)
    with blas.threads(max(1, blas.most_threads() // number)):
        yield from _in_lanes(build, items, number)


def _in_lanes(build: Callable[[_Item], _Made], items: Sequence[_Item], number: int) -> Iterator[_Made]:
    free = [_stream(lane) for lane in reversed(range(number))]
    under_way: deque[tuple[Future[None], mx.Stream, list[_Made]]] = deque()

    def oldest() -> _Made:
        evaluated, stream, held = under_way.popleft()
        evaluated.result()
        free.append(stream)
        return held.pop()

    try:
        for item in items:
            if not free:
                yield oldest()
            with mx.stream(stream := free.pop()):
                held = [build(item)]
            under_way.append((_threads().submit(mx.eval, held), stream, held))
        while under_way:
            yield oldest()
    finally:
        wait(
            [evaluated for evaluated, _, _ in under_way]
        )  # after an error too, so that nothing runs on after the return


@cache
def _stream(_lane: int) -> mx.Stream:
    return mx.new_thread_unsafe_stream(mx.cpu)  # graphs are built in one thread and evaluated in another


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cpu_cores(), thread_name_prefix="lane")
