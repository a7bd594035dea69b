"""Several processes that share one run: who does what, and how they exchange it.

`mlx.launch -n 2 ... grpo train` starts them and MLX connects them (ring, NCCL, MPI). Every process holds the same
policy and takes the same decisions from the same numbers; only sampling, scoring and gradients are divided.

Where a model is divided too (`model.shard`), several processes hold one model between them: a shard group. The work is
then divided among the groups, and what a group's processes are told, they are told by its first.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from grpo.backend.launched import CHOSEN, LAUNCHED, in_time, launched_alone, patience
from grpo.backend.links import Door
from grpo.backend.watch import Lost, Watch, silence
from grpo.errors import LostRankError, RunError, UserError

if TYPE_CHECKING:
    import mlx.core as mx

Item = TypeVar("Item")

log = logging.getLogger(__name__)

HEARD = 5.0
"""Seconds in which it is known who was lost, where MLX has noticed that somebody was."""
START = 300.0
"""Seconds in which all processes must have started; `GRPO_RANK_TIMEOUT` can only shorten it."""


class Ranks:
    """This process among `size`. Alone (rank 0 of 1), which is the default, every exchange is a no-op.

    `neighbours` of the processes are on this machine, itself included. Where each is one of a shard group (`divided`),
    `shard` are the processes that hold a model together, and `everyone` all that there are.
    """

    neighbours = 1
    watch: Watch | None = None
    spread: Ranks | None = None
    """Where these processes spread the weights over them (`model.shard: fsdp`): `divided`, whose `shard` does so, and
    which are those that have the same parts in other such groups."""
    watching: ClassVar[Watch | None] = None
    """The only one of this machine's process, once it was launched as one of several."""
    _connected: ClassVar[bool] = False
    _everyone: Ranks | None = None
    _shard: Ranks | None = None

    def __init__(self, group: mx.distributed.Group | None = None, everyone: Ranks | None = None) -> None:
        self.group = group
        self._everyone = everyone
        self.rank = group.rank() if group else 0
        self.size = group.size() if group else 1
        self.patience = patience()
        if everyone is not None:
            self.neighbours, self.watch = everyone.neighbours, everyone.watch
        elif group:
            name = socket.gethostname()
            self.neighbours = self.gather(name).count(name)

    def expect(self, seconds: float) -> None:
        """Wait so much longer for the others, because what they do alone may take that. What GRPO_RANK_TIMEOUT says
        holds nevertheless."""
        if CHOSEN not in os.environ:
            self.patience = patience() + seconds

    @classmethod
    def launched(cls) -> Ranks:
        """What a launcher made of this process. Raises UserError if it is to be one of several that cannot connect."""
        import mlx.core as mx

        if not any(name in os.environ for name in LAUNCHED) or launched_alone():
            return cls()
        try:
            with nullcontext() if Ranks._connected else in_time(min(START, patience())):
                ranks = cls(mx.distributed.init(strict=True))
        except RuntimeError as error:
            raise UserError(f"launched as one of several processes, but they cannot be connected: {error}") from error
        Ranks._connected = True  # from here on another may come as late as GRPO_RANK_TIMEOUT allows
        ranks.watch = Ranks.watching = Ranks.watching or ranks._linked()
        return ranks

    def _linked(self) -> Watch | None:
        """Link the processes, so that each hears whether the others are alive. None where they cannot be linked."""
        if self.size == 1:
            return None
        seconds, door = silence(), Door(self.rank, self.size)
        members = self.gather(door.member)
        links, wrong = door.links(members)
        failed = [(rank, why) for rank, why in enumerate(self.gather(wrong)) if why is not None]
        if failed:
            for link in links:
                link.close()
            if self.first:
                log.warning(
                    "process %d of %d cannot be linked with the others: %s. So the loss of a process is noticed only "
                    "where MLX notices it, or after %.0f s (GRPO_RANK_TIMEOUT). A firewall that lets MLX's ports alone "
                    "pass does that.",
                    *(failed[0][0], self.size, failed[0][1], self.patience),
                )
            return None
        watch = Watch(self.rank, members, links, seconds)
        watch.start()
        return watch

    def split(self, number: int, wanted: str, instead: str) -> Any:
        """The MLX group of all processes that ask with this `number`; all processes must ask.

        Raises UserError, with what was `wanted` and what to do `instead`, where the backend cannot make such groups.
        """
        assert self.group is not None
        try:
            return self.group.split(number)
        except RuntimeError as error:
            raise UserError(
                f"{wanted}: this backend of MLX cannot make groups of some of the processes ({error}). {instead}, or "
                "start the processes by --backend nccl, mpi or jaccl"
            ) from error

    def divided(self, size: int | None) -> Ranks:
        """These processes in shard groups of `size` neighbours each (None: one group of them all).

        What comes back shares and merges among the groups; its `shard` is this process's group. Raises UserError where
        they cannot be grouped so.
        """
        if self.size == 1:
            raise UserError(
                "model.shard divides a model among processes, and this is one process. Start several, as mlx.launch -n "
                f"{size or 2} ... grpo train, or leave model.shard out"
            )
        size = size or self.size
        if size > self.size or self.size % size:
            raise UserError(
                f"model.shard_size: {size} processes are to hold a model together, and {self.size} processes make no "
                f"whole number of such groups: start {size} or a multiple of it"
            )
        if size == self.size:
            divided = Ranks(everyone=self)
            divided._shard = self
            return divided
        wanted, instead = f"model.shard_size: {size} of {self.size} processes", f"Set model.shard_size to {self.size}"
        groups = [self.split(number, wanted, instead) for number in (self.rank // size, self.rank % size)]
        shard, divided = (Ranks(group, self) for group in groups)
        divided._shard = shard
        return divided

    @property
    def everyone(self) -> Ranks:
        """All processes of the run: these, unless the model is divided."""
        return self._everyone or self

    @property
    def shard(self) -> Ranks:
        """The processes that hold a model together with this one: this one alone unless the model is divided."""
        return self._shard or Ranks()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and talks."""
        return self.everyone.rank == 0

    @property
    def own(self) -> tuple[int, ...]:
        """What sets this process's random draws apart from the others'; nothing if there are none."""
        return () if self.size == 1 else (self.rank,)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of what all of them hold."""
        return list(items[self.rank :: self.size])

    def merge(self, mine: Sequence[Item]) -> list[Item]:
        """The parts that `share` made, after each process did its own, as one list in the former order."""
        if self.size == 1:
            return list(mine)
        parts: list[Sequence[Item]] = self.gather(mine)
        total = sum(map(len, parts))
        return [parts[i % self.size][i // self.size] for i in range(total)]

    def gather(self, mine: Any) -> list[Any]:
        """Something of every process's, in the order of ranks. It is pickled: only processes of one run exchange it."""
        if self.size == 1:
            return [mine]
        import mlx.core as mx
        import numpy as np

        data = pickle.dumps(mine)
        lengths: Any = self._exchange(lambda: mx.distributed.all_gather(mx.array([len(data)]), group=self.group))
        sizes = lengths.tolist()
        padded = mx.array(np.frombuffer(data.ljust(max(sizes), b"\0"), np.uint8))
        rows = self._exchange(lambda: mx.distributed.all_gather(padded[None], group=self.group))
        return [pickle.loads(np.array(rows[rank])[:size].tobytes()) for rank, size in enumerate(sizes)]

    def sum(self, tree: Any) -> Any:
        """The sum over processes of each array in a tree, all in one exchange."""
        if self.size == 1:
            return tree
        import mlx.core as mx
        from mlx.utils import tree_flatten, tree_unflatten

        paths, arrays = zip(*tree_flatten(tree), strict=True)
        flat = mx.concatenate([array.reshape(-1) for array in arrays])
        total = self._exchange(lambda: mx.distributed.all_sum(flat, group=self.group))
        parts, start = [], 0
        for path, array in zip(paths, arrays, strict=True):
            parts.append((path, total[start : start + array.size].reshape(array.shape)))
            start += array.size
        return tree_unflatten(parts)

    def passed(self, size: int, sender: int, receiver: int) -> None:
        """Pass so many bytes from one process to another. Only these two call it."""
        import mlx.core as mx

        if self.rank == sender:
            self._exchange(lambda: mx.distributed.send(mx.zeros(size, mx.uint8), receiver, group=self.group))
        elif self.rank == receiver:
            self._exchange(lambda: mx.distributed.recv((size,), mx.uint8, sender, group=self.group))

    def join(self, part: mx.array, axis: int) -> mx.array:
        """The parts of an array that each process has, all of one shape, along `axis` in the order of ranks."""
        if self.size == 1:
            return part
        import mlx.core as mx

        if axis == 0:
            return self._exchange(lambda: mx.distributed.all_gather(part, group=self.group))
        parts = self._exchange(lambda: mx.distributed.all_gather(part[None], group=self.group))
        return mx.concatenate(list(parts), axis=axis)

    def sum_counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        """The sums over processes of counts by name."""
        everyone = self.gather(dict(counts))
        return {name: float(sum(theirs[name] for theirs in everyone)) for name in counts}

    def wait(self) -> None:
        """Until every process is here."""
        self.everyone.gather(None)

    def finish(self) -> None:
        """Until every process is here, to end: a launcher ends the others, in the middle of a write, if one is gone."""
        self.wait()
        if self.watch is not None:
            self.watch.done()

    @property
    def keeper(self) -> bool:
        """Whether this process saves the run: the first, or where that was lost, the first that is left."""
        return self.first if self.watch is None else self.watch.heir

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """A block of a step, which is left as soon as another process is lost. Raises LostRankError then."""
        if self.watch is None:
            yield
            return
        try:
            with self.watch.interrupts():
                yield
        except Lost:
            raise self._lost("") from None
        except RuntimeError as error:  # of an exchange that a layer of a model makes
            if "[ring]" not in str(error):
                raise
            raise self._lost(str(error)) from None

    def hold(self) -> None:
        """From here on the block of `interrupts` is to be finished, whoever is lost."""
        if self.watch is not None:
            self.watch.hold()

    def keeps(self, last_resort: Callable[[], None]) -> AbstractContextManager[None]:
        """A block that sees to its own end where another process is lost.

        `last_resort` is called, in another thread, where the block is stuck in a computation that cannot be left.
        """
        if self.watch is None:
            return nullcontext()
        self.watch.last_resort = last_resort
        return self.watch.keeps()

    def check_whole(self) -> None:
        """Raise LostRankError if another process is known to be lost."""
        if self.watch is not None and self.watch.loss is not None:
            raise self._lost("")

    def _lost(self, error: str) -> LostRankError:
        """What is raised where another process was lost, once it is known which."""
        if self.watch is not None and (loss := self.watch.verdict(HEARD)) is not None:
            return LostRankError(loss.text, self.watch.heir or self.watch.alone)
        alone = f"process {self.rank} of {self.size}"
        if self.watch is not None and "[ring]" not in error:
            return LostRankError(f"{alone}: an exchange with the others failed, and all of them are there: {error}")
        return LostRankError(f"{alone}: another process was lost ({error})")

    def check_same(self, what: str, mine: Any) -> None:
        """Raise UserError where another process holds something else: they would train past each other."""
        everyone = self.everyone.gather(mine)
        if other := [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]:
            raise UserError(
                f"{what}: process {other[0]} of {len(everyone)} has another than process 0. All of them must be given "
                "the same files and arguments, and see the same output_dir (on several hosts: by a shared file system)"
            )

    def checked(self, check: Callable[[], Item]) -> Item:
        """What `check` returns, once it has succeeded in every process. Its own errors are raised as they are.

        Raises RunError where it failed in another process alone: this one would wait for that for ever.
        """
        try:
            found = check()
        except (UserError, RunError) as error:
            self.everyone.gather(str(error))
            raise
        others = [(rank, why) for rank, why in enumerate(self.everyone.gather(None)) if why is not None]
        if others:
            raise RunError(f"process {others[0][0]} of {self.everyone.size}: {others[0][1]}")
        return found

    def told(self, make: Callable[[], Item]) -> Item:
        """What `make` returns in the first process of the shard group, which alone calls it. Its errors are raised in
        all of them: where it was called as they are, elsewhere as RunError."""
        if self.shard.size == 1:
            return make()
        if self.shard.rank:
            found, why = self.shard.gather(None)[0]
            if why is not None:
                raise RunError(f"process {self.everyone.rank - self.shard.rank} of {self.everyone.size}: {why}")
            return cast(Item, found)
        try:
            made = make()
        except BaseException as error:
            known = isinstance(error, UserError | RunError)
            self.shard.gather((None, str(error) if known else f"{type(error).__name__}: {error}"))
            raise
        self.shard.gather((made, None))
        return made

    def _exchange(self, start: Callable[[], mx.array]) -> mx.array:
        import mlx.core as mx

        from grpo.backend.device import out_of_memory

        self.check_whole()
        with self._watched():
            try:
                result = start()
                mx.eval(result)
            except RuntimeError as error:  # MLX noticed before the clock did
                if out_of_memory(error):
                    raise
                raise self._lost(str(error)) from None
        return result

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """End this process if the others are not heard of in time: MLX itself would wait for ever."""
        clock = threading.Timer(self.patience, self._give_up)
        clock.daemon = True
        clock.start()
        try:
            with nullcontext() if self.watch is None or self.everyone is not self else self.watch.exchange():
                yield
        finally:
            clock.cancel()

    def _give_up(self) -> None:
        watch, seconds = self.watch, f"{self.patience:.0f} s"
        missing = [] if watch is None else watch.missing()
        what = "one died or cannot be reached"
        if watch is not None and missing:
            what = f"{', '.join(map(watch.name, missing))} is alive and did not come to what all do together"
        print(
            f"grpo: process {self.rank} of {self.size}: nothing from the others for {seconds}: {what}. The last "
            "checkpoint is intact. (GRPO_RANK_TIMEOUT sets how long to wait.)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
