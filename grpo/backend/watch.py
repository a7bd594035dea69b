"""Monitors the other processes of a run: if a process is lost, all others end soon, with a message that names it.

MLX waits forever for a process that is stopped or disconnected, and Python cannot interrupt this wait. So a thread in
each process sends a heartbeat to its two neighbors every second. The thread also runs during a compilation or rollout
of an hour. A process is silent only if it is stopped, if code holds Python's lock (GIL) for long, or if its machine or
network is down.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from grpo.backend.links import Link, Member, cut_ring
from grpo.backend.tickets import TicketOffice
from grpo.errors import UserError

BEAT = 1.0
"""Seconds between two heartbeats."""
SILENCE = 30.0
"""Seconds without a message after which a process counts as lost. `GRPO_RANK_SILENCE` overrides it."""
SETTLE = 2.0
"""Seconds in which a process that knows of a loss may exit with its own error first."""
GRACE = 20.0
"""Seconds after which a process that still computes, or waits in MLX, is ended forcibly."""
WAITS = 120.0
"""Seconds after which a process that waits for others logs their names."""
CALL = signal.SIGUSR2
"""The signal that the thread sends to the main thread."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LostRank:
    """The number of the lost process, and a sentence that names it and says what happened."""

    rank: int
    text: str


class Lost(KeyboardInterrupt):
    """Raised in the middle of a computation because another process was lost.

    It is a KeyboardInterrupt so that no `except Exception` catches it, and so that asyncio's loops end immediately.
    """


class Watch:
    """The links of this process to its neighbors, and the thread that listens to them.

    If the main thread does not return from a computation, `last_resort` is called before the process is ended. It
    returns a sentence for the last line of output, or nothing.
    """

    def __init__(self, rank: int, members: Sequence[Member], links: Sequence[Link], silence: float = SILENCE) -> None:
        self.rank, self.size, self.silence = rank, len(members), silence
        self.loss: LostRank | None = None
        self.last_resort: Callable[[], str] = str
        self.failed = False
        """Whether this process ends with an error, which ends the others too."""
        self.counts = [0] * self.size
        """Number of exchanges that each process has begun, as far as this process knows."""
        self._members, self._links = members, list(links)
        self.tickets = TicketOffice(rank, self.size, self._links)
        self._loss_known, self._seen, self._calls = threading.Event(), False, False
        self._former: Any = None
        self._mode: Literal["away", "open", "kept"] = "away"
        self._left = self._done = False
        self._since: float | None = None
        self._reported: list[int] = []
        self._held: set[int] = set()
        self._looked = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to send heartbeats and to listen."""
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(CALL, self._called)
            self._calls = True
        atexit.register(self.leave)
        self._thread.start()

    @property
    def alone(self) -> bool:
        """Whether this process itself was disconnected from the others."""
        return self.loss is not None and self.loss.rank == self.rank

    @property
    def heir(self) -> bool:
        """Whether this is the first of the remaining processes, which saves the last step."""
        lost = None if self.loss is None or self.alone else self.loss.rank
        return self.rank == next(rank for rank in range(self.size) if rank != lost)

    def verdict(self, seconds: float) -> LostRank | None:
        """Wait up to `seconds` for the lost process to be known. Returns None if it is still unknown."""
        self._loss_known.wait(seconds)
        return self.loss

    def name(self, rank: int) -> str:
        """The name of a process for messages: its number, and its host."""
        return f"process {rank} of {self.size} ({self._members[rank].host})"

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """A block that waits for all processes."""
        self.counts[self.rank] += 1
        self._done, self._since = False, time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def done(self) -> None:
        """From now on this process and the others may end at any time, unless another exchange begins."""
        self._done = True

    def missing(self) -> list[int]:
        """The processes that have not begun the exchange in which this process waits, as far as it knows."""
        return [rank for rank, count in enumerate(self.counts) if count < self.counts[self.rank]]

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        """A block in which `Lost` is raised when a process is lost, until `hold` is called."""
        self._mode = "open"
        try:
            if self.loss is not None:
                raise Lost
            yield
        finally:
            self._mode = "kept"

    def hold(self) -> None:
        """From now on the block of `interrupts` is not interrupted any more."""
        if self._mode == "open":
            self._mode = "kept"

    @contextmanager
    def keeps(self) -> Iterator[None]:
        """A block that ends by its own means when a process is lost: only `interrupts` inside it is interrupted."""
        former, self._mode = self._mode, "kept"
        try:
            yield
        finally:
            self._mode = former

    def leave(self) -> None:
        """Say goodbye at the end of this process. Without a goodbye, and after an error, the process counts as lost."""
        if self._left:
            return
        self._left = True
        failed = self.failed or hasattr(sys, "last_value")  # Python sets it after it prints an uncaught error
        for link in self._links:
            if not link.closed:
                link.send({"bye": self._done or not failed})
        self._thread.join(2 * BEAT)
        for link in self._links:
            link.close()

    def _run(self) -> None:
        beaten = time.monotonic() - BEAT
        while not self._left:
            if (now := time.monotonic()) - beaten >= BEAT:
                beaten = now
                self._tell({"at": self.counts})
            self._listen(BEAT / 4)
            if self.loss is None:
                self._look()
            self._say_missing()
            if self.loss is not None and not self._done:
                self._end()
                return

    def _tell(self, message: dict[str, Any], but: Link | None = None) -> None:
        for link in self._links:
            if link is not but and not link.closed:
                link.send(message)

    def _listen(self, seconds: float) -> None:
        links = [link for link in self._links if not link.closed]
        if not links:
            time.sleep(seconds)
            return
        for link in select.select(links, [], [], seconds)[0]:
            try:
                for message in link.read():
                    self._hear(link, message)
            except (OSError, ValueError):
                link.closed = True
                self._lose(link.peer, "died: it was killed, perhaps because memory ran out, or its machine went down")
            if link.closed:
                with suppress(OSError):
                    link.sock.close()

    def _hear(self, link: Link, message: dict[str, Any]) -> None:
        if "at" in message:
            self.counts = [max(pair) for pair in zip(self.counts, message["at"], strict=True)]
        if "bye" in message:
            link.closed = True
            if not message["bye"]:
                self._lose(link.peer, "ended before the others: its own output says why")
        if "lost" in message:
            rank, text = message["lost"]
            self._lose(rank, text, link)
        self.tickets.hear(link, message)

    def _look(self) -> None:
        """Declare a neighbor lost if it has been silent for too long."""
        now, looked = time.monotonic(), self._looked
        self._looked = now
        if now - looked > self.silence / 4:  # this process itself was stopped, and perhaps all others
            for link in self._links:
                link.heard = min(now, link.heard + now - looked)
        silence: dict[int, float] = {}
        for link in self._links:  # two processes have two links; a message on either is enough
            if not link.closed:
                silence[link.peer] = min(now - link.heard, silence.get(link.peer, math.inf))
        if max(silence.values(), default=0.0) <= self.silence:
            return
        # If both neighbors are disconnected simultaneously, their last heartbeats still came at different times.
        silent = [link for link in self._links if silence.get(link.peer, 0.0) > self.silence - 2 * BEAT]
        peers = sorted({link.peer for link in silent})
        if held := [peer for peer in peers if self._runs(peer, silent)]:
            self._wait_on(held)
            return
        if len(peers) > 1:
            self._lose(
                self.rank,
                f"has heard nothing from the others for {self.silence:.0f} s: its network is down, or theirs",
            )
            return
        what = f"has been silent for {self.silence:.0f} s: it is stopped, or its machine or network is down"
        if _end_stopped(self._members[peers[0]], silent[0], self._members[self.rank]):
            what = f"was stopped (silent for {self.silence:.0f} s), so grpo ended it"
        self._lose(peers[0], what)

    def _runs(self, peer: int, links: Sequence[Link]) -> bool:
        """Whether a silent process runs on this machine, and is neither stopped nor dead."""
        member = self._members[peer]
        here = member.machine == self._members[self.rank].machine
        return here and any(link.local for link in links if link.peer == peer) and is_running(member.pid)

    def _wait_on(self, peers: Sequence[int]) -> None:
        """Extend the wait for silent processes that still run: code that holds Python's lock (GIL) stops heartbeats."""
        for link in self._links:
            if link.peer in peers:
                link.heard = time.monotonic()
        if new := [peer for peer in peers if peer not in self._held]:
            self._held.update(new)
            log.warning(
                "%s has been silent for %.0f s, but still runs: some code holds Python's lock (GIL), or the machine is "
                "short of memory. The others wait.",
                *(", ".join(map(self.name, new)), self.silence),
            )

    def _say_missing(self) -> None:
        """Log which processes this one waits for, once, if it is the first of the waiting processes."""
        since, missing = self._since, self.missing()
        if since is None or not missing or missing == self._reported or time.monotonic() - since < WAITS:
            return
        self._reported = missing
        if self.rank == next(rank for rank in range(self.size) if rank not in missing):
            names = ", ".join(map(self.name, missing))
            log.warning("waiting for %s, which is alive but has not got this far, for %.0f s", names, WAITS)

    def _lose(self, rank: int, what: str, by: Link | None = None) -> None:
        """Record the first loss, and report it to the neighbors.

        If a neighbor reported the loss, `by` is its link, and `what` is a whole sentence.
        """
        if self.loss is not None or self._left:
            return
        text = what if by is not None else f"{self.name(rank)} {what}"
        self.loss = LostRank(rank, text)
        self._tell({"lost": [rank, text]}, by)
        self._loss_known.set()

    def _end(self) -> None:
        """Make the main thread leave its computation, or else end the process."""
        time.sleep(SETTLE)
        with suppress(Exception):  # an unexpected error here must not keep this process alive
            cut_ring()
        until = time.monotonic() + GRACE
        while time.monotonic() < until and not self._left and not (self._seen and self._mode == "kept"):
            if self._calls and not self._seen:
                signal.pthread_kill(threading.main_thread().ident or 0, CALL)
            time.sleep(BEAT / 4)
        if self._left or (self._seen and self._mode == "kept"):
            return
        assert self.loss is not None
        text = self.loss.text
        if self.heir:
            with suppress(Exception):
                text = ". ".join(filter(None, [text, self.last_resort()]))
        if self.heir or self.alone:
            print(f"grpo: {text}", file=sys.stderr, flush=True)
        os._exit(1)

    def _called(self, number: int, frame: FrameType | None) -> None:
        """The main thread's signal handler: leaves an interruptible computation after a loss."""
        if self.loss is None and callable(self._former):  # the signal came from a scheduler, for the script's handler
            self._former(number, frame)
        if self.loss is None or self._mode == "away" or self._seen:
            return
        self._seen = True
        if self._mode == "open":
            raise Lost


def _end_stopped(member: Member, link: Link, mine: Member) -> bool:
    """Kill a silent process on this machine, which cannot end itself. Returns whether it was killed."""
    if member.machine != mine.machine or not link.local:
        return False
    with suppress(OSError):
        os.kill(member.pid, signal.SIGKILL)
        return True
    return False


def is_running(pid: int) -> bool:
    """Whether a process on this machine exists, and is neither stopped nor dead."""
    return _state(pid) not in ("", "T", "t", "Z", "X")


def _state(pid: int) -> str:
    """The system's letter for a process's state; empty if there is no such process, or its state is unknown."""
    with suppress(OSError):  # there is no /proc on a Mac
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].strip()[:1]
    with suppress(OSError, subprocess.SubprocessError):
        command = ["ps", "-o", "stat=", "-p", str(pid)]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()[:1]
    return ""


def silence() -> float:
    """Seconds without a message after which a process counts as lost. Raises UserError for an invalid value."""
    value = os.environ.get("GRPO_RANK_SILENCE", str(SILENCE))
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 3 * BEAT <= seconds <= threading.TIMEOUT_MAX:
        raise UserError(f"GRPO_RANK_SILENCE: {value!r} is not a number of seconds that is at least {3 * BEAT:.0f}")
    return seconds
