"""`Group.split` for MLX's ring, which has none: neighbours in pairs, and those of one place in all pairs.

Slow, and for tests alone: so that four processes on one machine can be two groups of two.
"""

from __future__ import annotations

import grpo  # noqa: F401  before mlx, so that the BLAS is in place

# isort: split

from typing import Any

import mlx.core as mx

from grpo.backend.ranks import Ranks
from grpo.model import tensor

WORLD: list[Any] = []
ALL_SUM, ALL_GATHER = mx.distributed.all_sum, mx.distributed.all_gather


class Pair:
    """Two neighbours, which exchange by sending: at any time, whatever other pairs do."""

    def __init__(self, rank: int) -> None:
        self._rank, self.other = rank % 2, rank ^ 1

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2

    def swapped(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """What the first and the second have. The first sends before it receives, the second after."""
        sent = mx.distributed.send(x, self.other, group=WORLD[0])
        got = mx.distributed.recv_like(x, self.other, group=WORLD[0])
        return (sent, got) if self._rank == 0 else (got, sent)


class Across:
    """The processes of one place in all pairs. They exchange when all processes do."""

    def __init__(self, rank: int, size: int) -> None:
        self.members, self._rank = range(rank % 2, size, 2), rank // 2

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return len(self.members)

    def rows(self, x: mx.array) -> list[mx.array]:
        sizes: Any = ALL_GATHER(mx.array([x.size]), group=WORLD[0]).tolist()
        flat = mx.pad(x.reshape(-1), (0, max(sizes) - x.size))
        rows = ALL_GATHER(flat[None], group=WORLD[0])
        return [rows[member][: sizes[member]].reshape(x.shape) for member in self.members]


def all_sum(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
    if isinstance(group, Across):
        first, *others = group.rows(x)
        return sum(others, first)
    if not isinstance(group, Pair):
        return ALL_SUM(x, group=group, stream=stream)

    @mx.custom_function
    def total(x: mx.array) -> mx.array:
        first, second = group.swapped(x)
        return first + second

    @total.vjp
    def handed(_: mx.array, slope: mx.array, __: mx.array) -> mx.array:
        return slope

    found: mx.array = total(x)
    return found


def all_gather(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
    if isinstance(group, Across):
        return mx.concatenate(group.rows(x))
    return mx.concatenate(group.swapped(x)) if isinstance(group, Pair) else ALL_GATHER(x, group=group, stream=stream)


class Splitting:
    """The ring as a group that splits as `Ranks.divided` asks it to: first into pairs, then across."""

    def __init__(self, group: Any) -> None:
        self._asked = 0
        self.rank, self.size = group.rank, group.size

    def split(self, _color: int) -> Any:
        self._asked += 1
        return Pair(self.rank()) if self._asked % 2 else Across(self.rank(), self.size())


def _refused(*_: Any, **__: Any) -> mx.array:
    """As the ring does."""
    raise RuntimeError("[ring] sum_scatter not supported.")


def install() -> None:
    """Have MLX's ring split from here on."""
    launched = Ranks.launched

    def splitting() -> Ranks:
        ranks = launched()
        WORLD[:] = [ranks.group]
        ranks.group = Splitting(ranks.group)
        return ranks

    def exchanged(function: Any) -> Any:
        def call(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
            return function(x, group=WORLD[0] if isinstance(group, Splitting) else group, stream=stream)

        return call

    Ranks.launched = staticmethod(splitting)
    mx.distributed.all_sum, mx.distributed.all_gather = exchanged(all_sum), exchanged(all_gather)
    mx.distributed.sum_scatter = _refused
    tensor.Processes = (mx.distributed.Group, Pair)
