"""Lanes: on a CPU, several `Run`s decode in parallel, each in its own thread with its own MLX stream.

MLX computes the operations of a stream one after another, so a single run uses only one core. The lane of a row depends
only on the rows, never on the time that a lane takes: the same submissions give the same numbers to the bit.
"""

from __future__ import annotations

import atexit
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import cache
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import mlx.core as mx

from grpo.backend.device import on_gpu
from grpo.backend.lanes import own_cores
from grpo.generation.batching import Run
from grpo.generation.decoding import LANES_FROM, MOST_LANES, Decoding, Session
from grpo.generation.events import Events
from grpo.generation.parking import Parking
from grpo.generation.rows import Row, SharedPrompt
from grpo.generation.slots import Size
from grpo.generation.speculation import Speculation

_Made = TypeVar("_Made")

FEWEST_ROWS = 4
"""A lane with fewer rows than this costs about as much as a lane with this many rows."""
LARGE_STEP = 12 * 2**20
"""Two lanes are faster than one if a step's largest matrix product has at least this many multiplications."""
MOST_CORES = 3
"""With more cores, BLAS's own threads may use them better: this was not measured."""


def rollout_lanes(slots: int, largest_product: int, neighbours: int = 1) -> int:
    """The number of lanes that pays on this machine, if the model's largest weight has `largest_product` elements.

    `neighbours` processes share the machine's cores (`Ranks.neighbours`).

    Measured on two cores, two lanes were 1.2 to 1.3 times as fast with 256 slots and 1 M parameters, and with 64 slots
    and 25 M parameters. They were no faster with 64 slots and 1 M parameters, and slower with fewer slots, where the
    host's work per operation is most of a step.
    """
    cores = own_cores(neighbours)
    worth = slots >= LANES_FROM and slots * largest_product >= LARGE_STEP
    if on_gpu() or not worth or cores < MOST_LANES or cores > MOST_CORES:
        return 1
    return MOST_LANES


class _Worker:
    """A thread with its own MLX stream. MLX does not let other threads evaluate arrays of that stream.

    The thread frees the stream before the process ends: a stream that still exists then may abort the process.
    """

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        atexit.register(self._end)

    def begin(self, work: Callable[[], _Made]) -> Future[_Made]:
        future: Future[_Made] = Future()
        self._work.put((future, work))
        return future

    def _run(self) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            while (item := self._work.get()) is not None:
                future, work = item
                try:
                    future.set_result(work())
                except BaseException as error:  # raised again by `Future.result`
                    future.set_exception(error)
                del item, future, work  # otherwise the last step's arrays would live until the next step
        mx.clear_streams()

    def _end(self) -> None:
        self._work.put(None)
        self._thread.join()


@cache
def _worker(lane: int) -> _Worker:
    """The worker of a lane, shared by all engines of the process: its thread and stream live until the process ends."""
    return _Worker(f"lane-{lane}")


class _Common:
    """A decoding that lanes share: only one lane at a time opens or closes sessions."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding, self._lock = decoding, Lock()
        self.vocabulary, self.side_by_side, self.narrow = decoding.vocabulary, decoding.side_by_side, decoding.narrow
        self.description, self.refused, self.lockstep = decoding.description, decoding.refused, decoding.lockstep
        self.refresh, self.memory, self.outside = decoding.refresh, decoding.memory, decoding.outside

    def open(self, size: Size) -> Session:
        with self._lock:
            return self.decoding.open(size)

    def close(self, session: Session) -> None:
        with self._lock:
            self.decoding.close(session)

    def forget(self) -> None:
        with self._lock:
            self.decoding.forget()


class _InTurn:
    """Speculation that lanes share: only one lane at a time uses it."""

    def __init__(self, speculation: Speculation) -> None:
        self._speculation, self._lock, self.most = speculation, Lock(), speculation.most

    def width(self, rows: Sequence[Row | None]) -> int:
        with self._lock:
            return self._speculation.width(rows)

    def propose(self, rows: Sequence[Row | None], width: int) -> list[list[int]]:
        with self._lock:
            return self._speculation.propose(rows, width)

    def stepped(self, rows: Sequence[Row | None], width: int, taken: Sequence[int], seconds: float) -> None:
        with self._lock:
            self._speculation.stepped(rows, width, taken, seconds)

    def ended(self, row: Row) -> None:
        with self._lock:
            self._speculation.ended(row)


class Lanes:
    """Several runs with the interface of one `grpo.generation.batching.Run`. When `step` returns, all lanes have made
    their step: between two calls, only MLX is working.

    New rows wait here in order of arrival, and go to a lane when it has room: the lane with the fewest rows is served
    first, and the first of these if several have the fewest. A lane gets the first row whose prompt it already has, or
    else the first row whose prompt no lane has, or else the first row. So a prompt's rows stay together unless a lane
    would get less work. A row that has begun stays in its lane, and rows that are added to its prompt later join it.
    """

    def __init__(
        self,
        count: int,
        find_decoding: Callable[[], Decoding],
        slots: int,
        kept_bytes: int | None,
        speculation: Speculation | None,
    ) -> None:
        """Each of `count` lanes gets its share of the slots, and of the bytes that rows keep outside their slots."""
        self._find_decoding, self._common = find_decoding, _Common(find_decoding())
        in_turn = None if speculation is None else _InTurn(speculation)
        self._slots = [slots // count + (lane < slots % count) for lane in range(count)]
        share = None if kept_bytes is None else kept_bytes // count
        self.runs = [Run(lambda: self._common, most, Parking(share), in_turn) for most in self._slots]
        self._waiting: deque[Row] = deque()
        # Weak references: otherwise an engine that serves for days would hold all rows that it has ever had.
        self._lane: WeakKeyDictionary[Row, int] = WeakKeyDictionary()
        self._pieces = [WeakKeyDictionary[SharedPrompt, SharedPrompt]() for _ in self.runs]
        self._home: WeakKeyDictionary[SharedPrompt, int] = WeakKeyDictionary()  # the lane of each piece

    lockstep = False
    """A model that is divided over processes decodes in one lane."""

    @property
    def busy(self) -> bool:
        """Whether a row is decoding or waits for a slot, or a step has not been read yet."""
        return bool(self._waiting) or any(run.busy for run in self.runs)

    @property
    def load(self) -> int:
        """The number of rows that are decoding or wait for a slot."""
        return len(self._waiting) + sum(run.load for run in self.runs)

    def begin(self, row: Row) -> None:
        """Queue a new row."""
        mx.eval(row.key)  # in the thread that created it
        if (lane := self._home.get(row.prompt)) is not None:  # the row shares the prompt of a row that has begun
            self._lane[row] = lane
            self.runs[lane].begin(row)
            return
        row.state = "queued"
        self._waiting.append(row)

    def resume(self, row: Row) -> None:
        """Queue a row that was waiting or parked."""
        if row in self._lane:
            self.runs[self._lane[row]].resume(row)
        else:
            self.begin(row)

    def park(self, row: Row) -> None:
        """Take a row out of its slot or the queue. If the row is decoding, call `drain` first."""
        if row in self._lane:
            self.runs[self._lane[row]].park(row)
        else:
            self._waiting.remove(row)
            row.state = "parked"

    def release(self, row: Row) -> None:
        """Free a row that is not done. Freeing a lane's last row also frees the lane's buffers."""
        if row in self._lane:
            self._in_lane(self._lane[row], lambda run: run.release(row))
            return
        if row.state == "queued":
            self._waiting.remove(row)
        row.state = "released"

    def close(self) -> None:
        """Release all rows."""
        for row in self._waiting:
            row.state = "released"
        self._waiting.clear()
        self._each(range(len(self.runs)), Run.close)

    def abandon(self) -> None:
        """Release all rows and free all buffers, after all lanes have stopped working."""
        for row in self._waiting:
            row.state = "released"
        self._waiting.clear()
        self._each(range(len(self.runs)), Run.abandon)
        self._common.forget()  # `_settle` may have read weights before any lane opened a session

    def step(self) -> Events:
        """Let each lane decode until it has read one of its steps. The events are empty if all lanes are idle."""
        self._deal()
        busy = [lane for lane, run in enumerate(self.runs) if run.busy]
        if not any(any(run.seats.rows) for run in self.runs):
            self._settle()
        return _merged(self._each(busy, lambda run: run.step()))

    def drain(self) -> Events:
        """Read the steps in flight, if there are any, without launching new ones."""
        return _merged(self._each(range(len(self.runs)), Run.drain))

    def _settle(self) -> None:
        """Evaluate all arrays that lanes share before they begin: a lane cannot wait for another lane's stream."""
        decoding = self._find_decoding()
        if decoding is not self._common.decoding:
            self._common = _Common(decoding)
        self._common.refresh()

    def _each(self, lanes: Iterable[int], work: Callable[[Run], _Made]) -> list[_Made]:
        """Run `work` in these lanes in parallel. After all have finished, raises the first lane's error, if any."""
        begun = []
        for lane in lanes:
            begun.append(_worker(lane).begin(lambda run=self.runs[lane]: work(run)))  # type: ignore[misc]
            if not self._common.side_by_side:
                begun[-1].exception()
        for future in begun:
            future.exception()
        return [future.result() for future in begun]

    def _in_lane(self, lane: int, work: Callable[[Run], _Made]) -> _Made:
        return self._each([lane], work)[0]

    def _deal(self) -> None:
        """Distribute waiting rows to the lanes that have room."""
        at_work = [run.load for run in self.runs]
        open_lanes = len(self.runs)
        while open_lanes > 1 and not any(at_work) and self._too_few(open_lanes):
            open_lanes -= 1
        while self._waiting:
            room = [lane for lane in range(open_lanes) if at_work[lane] < self._slots[lane]]
            if not room:
                return
            lane = min(room, key=lambda lane: at_work[lane])
            row = self._next_for(lane)
            self._waiting.remove(row)
            row.prompt = self._piece(lane, row.prompt)
            self._lane[row] = lane
            self.runs[lane].begin(row)
            at_work[lane] += 1

    def _too_few(self, lanes: int) -> bool:
        """Whether this many lanes would have too few rows each, and one lane fewer has room for all waiting rows."""
        rows = len(self._waiting)
        return rows < lanes * FEWEST_ROWS and rows <= sum(self._slots[: lanes - 1])

    def _next_for(self, lane: int) -> Row:
        held = [{whole for whole, piece in pieces.items() if piece.left} for pieces in self._pieces]
        here = (row for row in self._waiting if row.prompt in held[lane])
        nowhere = (row for row in self._waiting if not any(row.prompt in prompts for prompts in held))
        return next(here, None) or next(nowhere, None) or self._waiting[0]

    def _piece(self, lane: int, whole: SharedPrompt) -> SharedPrompt:
        """The lane's own copy of a prompt, with one more row: it counts only the rows of this lane."""
        piece = self._pieces[lane].setdefault(whole, SharedPrompt(whole.ids, 0, whole.known))
        piece.join(1)
        self._home[piece] = lane
        return piece


def _merged(events: Sequence[Events]) -> Events:
    """The events of several lanes, with their slots one lane after the other."""
    if len(events) == 1:
        return events[0]

    def joined(name: str) -> list[Sequence[float]] | None:
        columns = [(getattr(e, name), len(e.rows)) for e in events]
        if all(column is None for column, _ in columns):
            return None
        return [values for column, slots in columns for values in column or [()] * slots]

    return Events(
        [row for e in events for row in e.rows],
        [tokens for e in events for tokens in e.token_ids],
        joined("logprobs"),
        joined("sampler_logprobs"),
        {row: reason for e in events for row, reason in e.ended.items()},
    )
