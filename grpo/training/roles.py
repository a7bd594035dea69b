"""Which of several processes sample and which train, where these are not the same (`ranks`)."""

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
"""What names the tickets of a step that is sampled ahead, where others have a process's number."""
WORD = 4
"""Bytes of the integers that carry other numbers' bits."""


@dataclass(frozen=True, slots=True)
class Roles:
    """What this process does of a run that samples and trains at the same time.

    The first processes train, so that the process that writes and saves is one of them; the others sample.

    everyone   all processes of the run
    learners   the processes that train; of use in these alone
    samplers   how many processes sample
    sampler    this process's number among them; None where it does not sample
    trains     whether this process trains
    """

    everyone: Ranks
    learners: Ranks
    samplers: int
    sampler: int | None
    trains: bool

    @classmethod
    def alone(cls) -> Roles:
        """All in this process, one after the other: the same numbers in more time."""
        return cls(Ranks(), Ranks(), 1, 0, True)

    @classmethod
    def of(cls, everyone: Ranks, cfg: RanksConfig) -> Roles:
        """The roles of launched processes.

        Raises UserError where there are fewer or more of them than the recipe says, and where those that train cannot
        be a group of their own.
        """
        if everyone.size != cfg.size:
            there = "this is one process" if everyone.size == 1 else f"there are {everyone.size}"
            raise UserError(
                f"ranks: sample: {cfg.sample} and train: {cfg.train} are {cfg.size} processes, and {there}. Start them "
                f"as mlx.launch -n {cfg.size} ... grpo train, or leave ranks out"
            )
        trains = everyone.rank < cfg.train
        sampler = None if trains else everyone.rank - cfg.train
        return cls(everyone, _learners(everyone, cfg, trains), cfg.sample, sampler, trains)

    @property
    def trainers(self) -> int:
        """How many processes train."""
        return max(1, self.everyone.size - self.samplers)

    @property
    def chief(self) -> bool:
        """Whether this is the first of the processes that train: the others go by its arrays and counts."""
        return self.trains and self.everyone.rank == 0

    def deal(self, step: int, total: int, room: int) -> Deal:
        """Which of the `total` tasks of a step this process samples, where each sampler has slots for `room` at once.

        As among processes that do everything (`Deal.of`): those that do not fit are taken by ticket.
        """
        share = [] if self.sampler is None else list(range(total)[self.sampler :: self.samplers])
        rounds = max(1, room)
        if self.sampler is None or self.everyone.watch is None or rounds * self.samplers >= total:
            return Deal(share)
        samplers = Ranks(everyone=self.everyone)
        samplers.rank, samplers.size = self.sampler, self.samplers
        return Deal(share[:rounds], samplers, [AHEAD, step], total)

    def spread(self, arrays: Mapping[str, mx.array]) -> Iterator[dict[str, mx.array]]:
        """The first trainer's arrays to the bit, in every process, some at a time. `arrays` are this process's.

        They travel as integers in a sum to which the others add 0, because every backend of MLX has sums. Where -0.0
        is added to 0.0 as numbers, its sign is lost.
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
    """The processes that train. Splitting takes all processes, also those that are then of no use to each other."""
    if cfg.train == 1:
        return Ranks(everyone=everyone)
    wanted = f"ranks.train: {cfg.train} processes that train exchange gradients while the others sample"
    return Ranks(everyone.split(0 if trains else 1, wanted, "Set ranks.train to 1"), everyone)
