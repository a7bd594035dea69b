"""Tickets: task numbers that the first process hands out while all processes sample.

Rollouts differ in length. A process that has finished its tasks takes the next ticket instead of waiting for others.
Tickets are sent over the links that `Watch` listens to, so no process has to stop decoding for them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from grpo.backend.links import Link

if TYPE_CHECKING:
    from grpo.backend.ranks import Ranks

_Item = TypeVar("_Item")

GLANCE = 0.5
"""Seconds between two checks for lost processes while this process waits for a ticket."""


class TicketOffice:
    """Requests tickets from the first process, around the ring of links; the first process answers.

    Each deal's tickets have a name. All processes have received their last answer for a name before any process asks
    for the next name.
    """

    def __init__(self, rank: int, size: int, links: Sequence[Link]) -> None:
        self.rank, self.size, self._links = rank, size, links
        self.opened = 0
        """Number of deals that this process has taken part in. Names contain it."""
        self._answers: SimpleQueue[list[Any]] = SimpleQueue()
        self._name: list[int] | None = None
        self._given: dict[tuple[int, int], int | None] = {}
        self._next = 0
        self._lock = threading.Lock()

    def ask(self, name: list[int], taker: int, number: int, first: int, total: int) -> None:
        """Request a taker's ticket number `number`, without waiting. Tickets are numbers from `first` up to `total`."""
        if self.rank == 0:
            self._answers.put([name, number, self._give(name, taker, number, first, total)])
        else:
            backward = self.rank <= self.size // 2
            self._links[backward].send({"ask": [self.rank, name, taker, number, first, total]})

    def answered(self, name: list[int], number: int, seconds: float) -> tuple[int | None] | None:
        """The answer to a request: `(ticket,)`, or `(None,)` if no ticket is left. None if no answer came in time.

        Late answers to requests of an interrupted rollout are skipped.
        """
        try:
            while True:
                answer_name, answer_number, ticket = self._answers.get(seconds > 0, seconds or None)
                if (answer_name, answer_number) == (name, number):
                    return (ticket,)
        except Empty:
            return None

    def hear(self, link: Link, message: dict[str, Any]) -> None:
        """Answer, forward or keep a message about tickets. Ignores other messages."""
        if "ask" in message:
            if self.rank == 0:
                rank, name, taker, number, *bounds = message["ask"]
                link.send({"ticket": [rank, name, number, self._give(name, taker, number, *bounds)]})
            else:
                self._beyond(link).send(message)
        elif "ticket" in message:
            rank, *answer = message["ticket"]
            if rank == self.rank:
                self._answers.put(answer)
            else:
                self._beyond(link).send(message)

    def _beyond(self, link: Link) -> Link:
        """The other link of this process, so that messages keep their direction around the ring."""
        return self._links[self._links[0] is link]

    def _give(self, name: list[int], taker: int, number: int, first: int, total: int) -> int | None:
        """A taker's ticket. Processes that share a model are one taker: each asks for the same ticket, and gets it."""
        with self._lock:
            if name != self._name:
                self._name, self._given, self._next = name, {}, first
            if (taker, number) not in self._given:
                self._given[taker, number] = self._next if self._next < total else None
                self._next += 1
            return self._given[taker, number]


class Deal:
    """Decides which of a step's tasks this process samples. Exactly one process samples each task.

    A process begins with as many tasks of its share (`Ranks.share`) as every process has room for, and takes further
    tasks by ticket. If all processes have room for their whole shares there are no tickets, and nothing depends on
    timing.
    """

    def __init__(
        self, begin: Sequence[int], ranks: Ranks | None = None, name: list[int] | None = None, total: int = 0
    ) -> None:
        """This process begins with the tasks `begin`. With a `name` there are tickets, up to `total`."""
        self.begin = list(begin)
        self.taken: list[int] = []
        """The numbers of this process's tasks, in the order in which it took them."""
        self._ranks, self._name, self._total = ranks, name, total
        self._asked, self._tickets = False, 0
        self._left = name is not None

    @classmethod
    def of(cls, ranks: Ranks, total: int, room: int) -> Deal:
        """Deal out `total` tasks. All processes must call this. This process has slots for `room` tasks."""
        share, office = ranks.share(range(total)), None if ranks.watch is None else ranks.watch.tickets
        if ranks.size == 1 or office is None:
            return cls(share, ranks)
        office.opened += 1
        rooms, names = zip(*ranks.gather((room, [office.rank, office.opened])), strict=True)
        name, rounds = ranks.shard.gather((names[0], max(1, min(rooms))))[0]
        if rounds * ranks.size >= total:
            return cls(share, ranks)
        return cls(share[:rounds], ranks, name, total)

    @property
    def goes_on(self) -> bool:
        """Whether this process may get another task."""
        return self._left or len(self.taken) < len(self.begin)

    def take(self, wait: bool) -> int | None:
        """The number of this process's next task. None if no task is left, or if there is no answer yet and `wait` is
        False. Raises LostRankError if another process was lost meanwhile.
        """
        if len(self.taken) < len(self.begin):
            number: int | None = self.begin[len(self.taken)]
        else:
            number = self._ticket(wait) if self._left else None
        if number is not None:
            self.taken.append(number)
        return number

    def merge(self, mine: Sequence[_Item]) -> list[_Item]:
        """All processes' results, one item per task, in the order of tasks. `mine` are this process's, as taken."""
        if self._ranks is None or self._ranks.size == 1:
            return list(mine)
        parts = self._ranks.gather(list(zip(self.taken, mine, strict=True)))
        return [item for _, item in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]

    def _ticket(self, wait: bool) -> int | None:
        assert self._ranks is not None
        assert self._ranks.watch is not None
        assert self._name is not None
        ranks, office = self._ranks, self._ranks.watch.tickets
        if not self._asked:
            office.ask(self._name, ranks.rank, self._tickets, len(self.begin) * ranks.size, self._total)
            self._asked = True
        # Processes that share a model must continue identically, so none of them may skip the wait.
        wait = wait or ranks.shard.size > 1
        while (answer := office.answered(self._name, self._tickets, GLANCE if wait else 0)) is None and wait:
            ranks.check_whole()
        if answer is None:
            return None
        self._asked, self._tickets, self._left = False, self._tickets + 1, answer[0] is not None
        return answer[0]
