"""Lanes: on a CPU several `Run`s decode side by side, each in a thread of its own with an MLX stream of its own.

MLX computes a stream's operations one after another, so a single run keeps one core busy whatever the machine has.
Which lane a row goes to depends on the rows alone, never on the time that a lane takes: the same submissions give the
same numbers to the bit.
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
"""A lane with fewer rows costs about as much as one with four."""
LARGE_STEP = 12 * 2**20
"""From so many multiplications of a step's largest matrix product on, two lanes are faster than one."""
MOST_CORES = 3
"""With more, BLAS's own threads may use them better: that was not measured."""


def rollout_lanes(slots: int, largest_product: int, neighbours: int = 1) -> int:
    """How many lanes pay on this machine, for a model whose largest weight has so many numbers.

    `neighbours` processes share its cores (`Ranks.neighbours`).

    Two, seen on two cores: 1.2 to 1.3 times faster at 256 slots of a model of 1 M parameters and 64 of 25 M; no faster
    at 64 slots of 1 M, and slower below, where the host's work for each operation is most of a step.
    """
    cores = own_cores(neighbours)
    worth = slots >= LANES_FROM and slots * largest_product >= LARGE_STEP
    if on_gpu() or not worth or cores < MOST_LANES or cores > MOST_CORES:
        return 1
    return MOST_LANES


class _Worker:
    """A thread that has an MLX stream: MLX lets no other thread evaluate what is computed there.

    It gives the stream back before the process ends: one that MLX still finds then may abort the process.
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
                except BaseException as error:  # raised again by whoever asks for the result
                    future.set_exception(error)
                del item, future, work  # or the last step's arrays would live until the next
        mx.clear_streams()

    def _end(self) -> None:
        self._work.put(None)
        self._thread.join()


@cache
def _worker(lane: int) -> _Worker:
    """One for each lane of a process, however many engines there are: neither threads nor streams are ever freed."""
    return _Worker(f"lane-{lane}")


class _Common:
    """A decoding that lanes share, opened and let go of by one lane at a time."""

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
    """Speculation that lanes share: one of them at a time."""

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
    """Several runs behind the methods of one (`grpo.generation.batching.Run`). All lanes have made their step when
    `step` returns: nothing but MLX is at work between two calls.

    Rows that have not begun wait here, in the order in which they came, and go to a lane as it has room: while lanes
    have as many rows, the first lane is served first. A lane takes a row of a prompt that it has, or else of a prompt
    that no lane has, or else the first. So a prompt's rows are together unless a lane would be left with less to do.
    A row that has begun stays in its lane, and rows that are submitted beside it go there too.
    """

    def __init__(
        self,
        count: int,
        find_decoding: Callable[[], Decoding],
        slots: int,
        kept_bytes: int | None,
        speculation: Speculation | None,
    ) -> None:
        """Each of `count` lanes has its share of the slots, and of the bytes that rows may keep outside of them."""
        self._find_decoding, self._common = find_decoding, _Common(find_decoding())
        in_turn = None if speculation is None else _InTurn(speculation)
        self._slots = [slots // count + (lane < slots % count) for lane in range(count)]
        share = None if kept_bytes is None else kept_bytes // count
        self.runs = [Run(lambda: self._common, most, Parking(share), in_turn) for most in self._slots]
        self._waiting: deque[Row] = deque()
        # Weakly, or an engine that serves for days would hold all rows that it has had.
        self._lane: WeakKeyDictionary[Row, int] = WeakKeyDictionary()
        self._pieces = [WeakKeyDictionary[SharedPrompt, SharedPrompt]() for _ in self.runs]
        self._home: WeakKeyDictionary[SharedPrompt, int] = WeakKeyDictionary()  # the lane of each piece

    lockstep = False
    """A divided model decodes in one lane."""

    @property
    def busy(self) -> bool:
        """Whether a row decodes or waits for a slot, or a step has not been read yet."""
        return bool(self._waiting) or any(run.busy for run in self.runs)

    @property
    def load(self) -> int:
        """Rows that decode or wait for a slot."""
        return len(self._waiting) + sum(run.load for run in self.runs)

    def begin(self, row: Row) -> None:
        """Queue a new row."""
        mx.eval(row.key)  # in the thread that has made it
        if (lane := self._home.get(row.prompt)) is not None:  # it shares the prompt of a row that has begun
            self._lane[row] = lane
            self.runs[lane].begin(row)
            return
        row.state = "queued"
        self._waiting.append(row)

    def go_on(self, row: Row) -> None:
        """Queue a row that was waiting or parked."""
        if row in self._lane:
            self.runs[self._lane[row]].go_on(row)
        else:
            self.begin(row)

    def park(self, row: Row) -> None:
        """Take a row out of its slot or the queue. Call `drain` first if the row decodes."""
        if row in self._lane:
            self.runs[self._lane[row]].park(row)
        else:
            self._waiting.remove(row)
            row.state = "parked"

    def release(self, row: Row) -> None:
        """Free a row that is not done; with the last of a lane's, free the lane's buffers."""
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
        """Release all rows, and free all buffers, once no lane is at work."""
        for row in self._waiting:
            row.state = "released"
        self._waiting.clear()
        self._each(range(len(self.runs)), Run.abandon)
        self._common.forget()  # what was taken over before a lane began

    def step(self) -> Events:
        """Let each lane decode until one step of its own has been read. No events if all are idle."""
        self._deal()
        busy = [lane for lane, run in enumerate(self.runs) if run.busy]
        if not any(any(run.seats.rows) for run in self.runs):
            self._settle()
        return _merged(self._each(busy, lambda run: run.step()))

    def drain(self) -> Events:
        """Read the steps in flight, if there are any, without launching others."""
        return _merged(self._each(range(len(self.runs)), Run.drain))

    def _settle(self) -> None:
        """Let everything that lanes read be computed before they begin: one of them cannot wait for another's work."""
        decoding = self._find_decoding()
        if decoding is not self._common.decoding:
            self._common = _Common(decoding)
        self._common.refresh()

    def _each(self, lanes: Iterable[int], work: Callable[[Run], _Made]) -> list[_Made]:
        """Do this in each of the lanes, side by side. Raises the first lane's error, once no lane is at work."""
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
        """Give rows that wait to the lanes that have room."""
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
        """Whether one lane less has room for all rows that wait, and so many would have too few rows each."""
        rows = len(self._waiting)
        return rows < lanes * FEWEST_ROWS and rows <= sum(self._slots[: lanes - 1])

    def _next_for(self, lane: int) -> Row:
        held = [{whole for whole, piece in pieces.items() if piece.left} for pieces in self._pieces]
        mine = (row for row in self._waiting if row.prompt in held[lane])
        new = (row for row in self._waiting if not any(row.prompt in prompts for prompts in held))
        return next(mine, None) or next(new, None) or self._waiting[0]

    def _piece(self, lane: int, whole: SharedPrompt) -> SharedPrompt:
        """The prompt as this lane has it, for one row more: what is counted there are the lane's own rows."""
        piece = self._pieces[lane].setdefault(whole, SharedPrompt(whole.ids, 0, whole.known))
        piece.join(1)
        self._home[piece] = lane
        return piece


def _merged(events: Sequence[Events]) -> Events:
    """The events of several lanes, one lane's slots behind the other's."""
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
