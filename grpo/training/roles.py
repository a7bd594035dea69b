"""Which of several processes sample and which train, if a run separates the two (`ranks`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import mlx.core as mx

from grpo.backend.ranks import Ranks
from grpo.backend.tickets import Deal
from grpo.config import RanksConfig
from grpo.errors import UserError
from grpo.training.optimizer import grouped

AHEAD = -1
"""Marks the tickets of a step that is sampled ahead. Other tickets have the number of a process in its place."""
WORD = 4
"""Bytes of the integers that carry the bits of other numbers."""


@dataclass(frozen=True, slots=True)
class Roles:
    """The role of this process in a run that samples and trains at the same time.

    The first processes train, so that the process that logs and saves is one of them. The others sample.

    everyone   all processes of the run
    learners   the processes that train; only they may use this
    samplers   number of processes that sample
    sampler    index of this process among the samplers; None if it does not sample
    trains     whether this process trains
    """

    everyone: Ranks
    learners: Ranks
    samplers: int
    sampler: int | None
    trains: bool

    @classmethod
    def alone(cls) -> Roles:
        """The roles of a single process that samples and trains in turn. It computes the same numbers, more slowly."""
        return cls(Ranks(), Ranks(), 1, 0, True)

    @classmethod
    def of(cls, everyone: Ranks, cfg: RanksConfig) -> Roles:
        """The roles of launched processes.

        Raises UserError if their number differs from the recipe's, or if the processes that train cannot form a
        communication group.
        """
        if everyone.size != cfg.size:
            found = "this is a single process" if everyone.size == 1 else f"{everyone.size} are running"
            raise UserError(
                f"ranks: sample: {cfg.sample} and train: {cfg.train} need {cfg.size} processes, but {found}. Start "
                f"them with mlx.launch -n {cfg.size} ... grpo train, or remove ranks"
            )
        trains = everyone.rank < cfg.train
        sampler = None if trains else everyone.rank - cfg.train
        return cls(everyone, _learners(everyone, cfg, trains), cfg.sample, sampler, trains)

    @property
    def trainers(self) -> int:
        """The number of processes that train."""
        return max(1, self.everyone.size - self.samplers)

    @property
    def chief(self) -> bool:
        """Whether this is the first process that trains: all others take its arrays and counts."""
        return self.trains and self.everyone.rank == 0

    def deal(self, step: int, total: int, room: int) -> Deal:
        """Which of the `total` tasks of a step this process samples, if each sampler has slots for `room` tasks.

        As in `Deal.of`, samplers take the tasks that do not fit by ticket.
        """
        share = [] if self.sampler is None else list(range(total)[self.sampler :: self.samplers])
        rounds = max(1, room)
        if self.sampler is None or self.everyone.watch is None or rounds * self.samplers >= total:
            return Deal(share)
        samplers = Ranks(everyone=self.everyone)
        samplers.rank, samplers.size = self.sampler, self.samplers
        return Deal(share[:rounds], samplers, [AHEAD, step], total)

    def spread(self, arrays: Mapping[str, mx.array]) -> Iterator[dict[str, mx.array]]:
        """Yield the first trainer's arrays, exact to the bit, in every process, a few at a time.

        `arrays` are this process's arrays. The values travel as integers, in a sum to which other processes add 0,
        because every MLX backend has sums. A sum of floats would lose the sign of -0.0.
        """
        for dtype in dict.fromkeys(array.dtype for array in arrays.values()):
            alike = {path: array for path, array in arrays.items() if array.dtype == dtype}
            for paths in grouped(alike):
                yield self._sent({path: alike[path] for path in paths})

    def _sent(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        flat = mx.concatenate([array.reshape(-1) for array in arrays.values()])
        dtype, length = flat.dtype, flat.size
        bits = mx.pad(flat, (0, -length % (WORD // dtype.size))).view(mx.uint32)
        (bits,) = self.everyone.sum([bits if self.chief else mx.zeros_like(bits)])
        flat, found, start = bits.view(dtype), {}, 0
        for path, array in arrays.items():
            found[path] = flat[start : start + array.size].reshape(array.shape)
            start += array.size
        mx.eval(found)
        return found


def _learners(everyone: Ranks, cfg: RanksConfig, trains: bool) -> Ranks:
    """The processes that train. All processes must take part in the split, also the samplers, which do not use it."""
    if cfg.train == 1:
        return Ranks(everyone=everyone)
    assert everyone.group is not None
    try:
        group = everyone.group.split(0 if trains else 1)
    except RuntimeError as error:
        raise UserError(
            f"ranks.train: {cfg.train} processes that train exchange gradients while the others sample, but this "
            f"MLX backend cannot make a group of them ({error}). Set ranks.train to 1, or start the processes with "
            "--backend nccl, mpi or jaccl"
        ) from error
    return Ranks(group, everyone)
