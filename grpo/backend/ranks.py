"""Several processes that share one run: how they divide the work, and how they exchange results.

`mlx.launch -n 2 ... grpo train` starts the processes, and MLX connects them (ring, NCCL, MPI). Every process holds the
same policy and makes the same decisions from the same numbers; only sampling, scoring and gradients are divided.

If the model is divided too (`model.shard`), several processes share one model: a shard group. The work is then divided
among the groups. Within a group, the first process computes shared values and sends them to the others (`told`).
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
"""Seconds to wait for the name of a lost process after MLX has noticed a loss."""
START = 300.0
"""Seconds in which all processes must have started. `GRPO_RANK_TIMEOUT` can only shorten it."""


class Ranks:
    """This process among `size` processes. With one process (rank 0 of 1), the default, every exchange is a no-op.

    `neighbours` is the number of processes on this machine, this one included. If the processes form shard groups
    (`divided`), `shard` are the processes that share this process's model, and `everyone` are all processes.
    """

    neighbours = 1
    watch: Watch | None = None
    spread: Ranks | None = None
    """With `model.shard: fsdp`, the result of `divided`: its `shard` spreads the weights, and its own ranks are the
    processes with the same parts in other groups. None otherwise."""
    watching: ClassVar[Watch | None] = None
    """The only watch of this process, if it was launched as one of several."""
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
        """Wait `seconds` longer for the others, because they may need that time for work of their own. If
        GRPO_RANK_TIMEOUT is set, it takes precedence."""
        if CHOSEN not in os.environ:
            self.patience = patience() + seconds

    @classmethod
    def launched(cls) -> Ranks:
        """The processes that a launcher started, this one included. Raises UserError if they cannot connect."""
        import mlx.core as mx

        if not any(name in os.environ for name in LAUNCHED) or launched_alone():
            return cls()
        try:
            with nullcontext() if Ranks._connected else in_time(min(START, patience())):
                ranks = cls(mx.distributed.init(strict=True))
        except RuntimeError as error:
            raise UserError(f"launched as one of several processes, but they cannot be connected: {error}") from error
        Ranks._connected = True  # later exchanges are limited only by GRPO_RANK_TIMEOUT
        ranks.watch = Ranks.watching = Ranks.watching or ranks._linked()
        return ranks

    def _linked(self) -> Watch | None:
        """Link the processes, so that each monitors the others. Returns None if they cannot be linked."""
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
                    "process %d of %d cannot be linked with the others: %s. So grpo notices the loss of a process only "
                    "if MLX notices it, or after %.0f s (GRPO_RANK_TIMEOUT). A possible cause is a firewall that lets "
                    "only MLX's ports pass.",
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
        """Form shard groups of `size` consecutive processes each (None: one group of all).

        The result shares and merges work among the groups; its `shard` is this process's group. Raises UserError if
        these groups are impossible.
        """
        if self.size == 1:
            raise UserError(
                "model.shard divides a model among processes, but this is a single process. Start several, with "
                f"mlx.launch -n {size or 2} ... grpo train, or remove model.shard (on resuming: model.shard=null)"
            )
        size = size or self.size
        if size > self.size or self.size % size:
            raise UserError(
                f"model.shard_size: groups of {size} processes share a model, but {self.size} processes cannot be "
                f"divided into such groups: start {size} processes or a multiple of {size}"
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
        """All processes of the run. Without shard groups, these processes."""
        return self._everyone or self

    @property
    def shard(self) -> Ranks:
        """The processes that share a model with this one. Without shard groups, only this process."""
        return self._shard or Ranks()

    @property
    def first(self) -> bool:
        """Whether this is rank 0 of the run, the process that writes files and logs."""
        return self.everyone.rank == 0

    @property
    def own(self) -> tuple[int, ...]:
        """The part of a random key that makes this process's draws differ from the others'; empty for one process."""
        return () if self.size == 1 else (self.rank,)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of a list that all processes hold."""
        return list(items[self.rank :: self.size])

    def merge(self, mine: Sequence[Item]) -> list[Item]:
        """The inverse of `share`: the processes' results for their parts as one list, in the original order."""
        if self.size == 1:
            return list(mine)
        parts: list[Sequence[Item]] = self.gather(mine)
        total = sum(map(len, parts))
        return [parts[i % self.size][i // self.size] for i in range(total)]

    def gather(self, mine: Any) -> list[Any]:
        """A value from every process, in the order of ranks. Values are pickled, only between processes of one run."""
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
        """Each array of a tree summed over the processes, in a single exchange."""
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
        """Send `size` bytes from one process to another. Only these two processes do anything."""
        import mlx.core as mx

        if self.rank == sender:
            self._exchange(lambda: mx.distributed.send(mx.zeros(size, mx.uint8), receiver, group=self.group))
        elif self.rank == receiver:
            self._exchange(lambda: mx.distributed.recv((size,), mx.uint8, sender, group=self.group))

    def join(self, part: mx.array, axis: int) -> mx.array:
        """The processes' parts of an array, all of the same shape, concatenated along `axis` in the order of ranks."""
        if self.size == 1:
            return part
        import mlx.core as mx

        if axis == 0:
            return self._exchange(lambda: mx.distributed.all_gather(part, group=self.group))
        parts = self._exchange(lambda: mx.distributed.all_gather(part[None], group=self.group))
        return mx.concatenate(list(parts), axis=axis)

    def sum_counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Counts by name, summed over the processes."""
        everyone = self.gather(dict(counts))
        return {name: float(sum(each[name] for each in everyone)) for name in counts}

    def wait(self) -> None:
        """Wait until every process has called this."""
        self.everyone.gather(None)

    def finish(self) -> None:
        """Wait for every process before exiting. A launcher ends all others when one exits, even during a write."""
        self.wait()
        if self.watch is not None:
            self.watch.done()

    @property
    def keeper(self) -> bool:
        """Whether this process saves the run: the first process, or if it was lost, the first of the others."""
        return self.first if self.watch is None else self.watch.heir

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """A block of a step that is interrupted as soon as another process is lost. Raises LostRankError then."""
        if self.watch is None:
            yield
            return
        try:
            with self.watch.interrupts():
                yield
        except Lost:
            raise self._lost("") from None
        except RuntimeError as error:  # raised by an exchange inside a layer of the model
            if "[ring]" not in str(error):
                raise
            raise self._lost(str(error)) from None

    def hold(self) -> None:
        """From now on the block of `interrupts` is not interrupted any more, whichever process is lost."""
        if self.watch is not None:
            self.watch.hold()

    def keeps(self, last_resort: Callable[[], str]) -> AbstractContextManager[None]:
        """A block that ends by its own means if another process is lost.

        `last_resort` is called, in another thread, if the block is stuck in a computation that cannot be interrupted,
        and returns a sentence about what is saved.
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
        """The error for a lost process. Waits until the process's name is known, up to `HEARD` seconds."""
        if self.watch is not None and (loss := self.watch.verdict(HEARD)) is not None:
            return LostRankError(loss.text, self.watch.heir or self.watch.alone)
        alone = f"process {self.rank} of {self.size}"
        if self.watch is not None and "[ring]" not in error:
            return LostRankError(f"{alone}: an exchange with the others failed, although all are running: {error}")
        return LostRankError(f"{alone}: another process was lost ({error})")

    def check_same(self, what: str, mine: Any) -> None:
        """Raise UserError if another process has a different value, because the processes would then train apart."""
        everyone = self.everyone.gather(mine)
        if other := [rank for rank, value in enumerate(everyone) if value != everyone[0]]:
            raise UserError(
                f"{what}: process {other[0]} of {len(everyone)} differs from process 0. All processes need the same "
                "files and arguments, and must see the same output_dir (on several hosts: a shared file system)"
            )

    def checked(self, check: Callable[[], Item]) -> Item:
        """The result of `check`, after it has succeeded in every process. Its errors in this process are raised as is.

        Raises RunError if `check` failed only in another process, for which this process would wait forever.
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
        """The result of `make`, which only the first process of the shard group calls, in all processes of the group.

        Errors of `make` are raised in all of them: in the first process as they are, in the others as RunError.
        """
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
            except RuntimeError as error:  # MLX noticed the loss before the timer or the watch
                if out_of_memory(error):
                    raise
                raise self._lost(str(error)) from None
        return result

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """End this process if the exchange takes longer than `patience`, because MLX would wait forever."""
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
            what = f"{', '.join(map(watch.name, missing))} is alive, but has not reached this exchange"
        print(
            f"grpo: process {self.rank} of {self.size}: nothing from the others for {seconds}: {what}. The last "
            "checkpoint is intact. (GRPO_RANK_TIMEOUT sets how long to wait.)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
