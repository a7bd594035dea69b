"""Tickets: the numbers of tasks, which the first process hands out while all processes sample.

Rollouts differ in length. A process that is done with its own takes the next ticket, in the place of waiting for the
others. Tickets go over the links that `Watch` listens to, so no process has to stop decoding for them.
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
"""Seconds between two looks at whether another process was lost, while this one waits for a ticket."""


class TicketOffice:
    """Where a process gets its tickets: from the first process, which is asked around the ring of links.

    What a ticket is for has a name. All processes have been given their last answer before anybody asks for another.
    """

    def __init__(self, rank: int, size: int, links: Sequence[Link]) -> None:
        self.rank, self.size, self._links = rank, size, links
        self.opened = 0
        """Deals that this process has taken part in, which makes names."""
        self._answers: SimpleQueue[list[Any]] = SimpleQueue()
        self._name: list[int] | None = None
        self._given: dict[tuple[int, int], int | None] = {}
        self._next = 0
        self._lock = threading.Lock()

    def ask(self, name: list[int], taker: int, number: int, first: int, total: int) -> None:
        """Ask for ticket number `number` of a taker, out of those from `first` to `total`. Does not wait."""
        if self.rank == 0:
            self._answers.put([name, number, self._give(name, taker, number, first, total)])
        else:
            backward = self.rank <= self.size // 2
            self._links[backward].send({"ask": [self.rank, name, taker, number, first, total]})

    def answered(self, name: list[int], number: int, seconds: float) -> tuple[int | None] | None:
        """The ticket that was asked for, or None in its place if none is left; nothing if no answer came in time.

        Of an interrupted rollout an answer may still come, for which nobody waits any more.
        """
        try:
            while True:
                its_name, its_number, ticket = self._answers.get(seconds > 0, seconds or None)
                if (its_name, its_number) == (name, number):
                    return (ticket,)
        except Empty:
            return None

    def hear(self, link: Link, message: dict[str, Any]) -> None:
        """Answer, pass on or keep what another process has sent; other messages are not for this place."""
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
        """The other link of this process: messages go on in their direction."""
        return self._links[self._links[0] is link]

    def _give(self, name: list[int], taker: int, number: int, first: int, total: int) -> int | None:
        """A taker's ticket. Those who hold a model together ask one after the other for the same, and get it."""
        with self._lock:
            if name != self._name:
                self._name, self._given, self._next = name, {}, first
            if (taker, number) not in self._given:
                self._given[taker, number] = self._next if self._next < total else None
                self._next += 1
            return self._given[taker, number]


class Deal:
    """Which of a step's tasks this process samples; each task is sampled by one process alone.

    A process begins with as much of its share (`Ranks.share`) as any process has room for at once, and takes the rest
    by ticket. Where all have room for their shares there are no tickets, and nothing depends on the clock.
    """

    def __init__(
        self, begin: Sequence[int], ranks: Ranks | None = None, name: list[int] | None = None, total: int = 0
    ) -> None:
        """This process begins with the tasks of these numbers. With a `name` there are tickets, up to `total`."""
        self.begin = list(begin)
        self.taken: list[int] = []
        """The numbers of its tasks, in the order in which it took them."""
        self._ranks, self._name, self._total = ranks, name, total
        self._asked, self._tickets = False, 0
        self._left = name is not None

    @classmethod
    def of(cls, ranks: Ranks, total: int, room: int) -> Deal:
        """Deal out `total` tasks. All processes call it; `room` is for how many tasks this one has slots."""
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
        """Whether there may be another task for this process."""
        return self._left or len(self.taken) < len(self.begin)

    def take(self, wait: bool) -> int | None:
        """The number of this process's next task. None if no other is left; or if nobody has answered yet, unless this
        is to `wait`. Raises LostRankError where another process was lost meanwhile.
        """
        if len(self.taken) < len(self.begin):
            number: int | None = self.begin[len(self.taken)]
        else:
            number = self._ticket(wait) if self._left else None
        if number is not None:
            self.taken.append(number)
        return number

    def merge(self, mine: Sequence[_Item]) -> list[_Item]:
        """What each process has made of the tasks that it took, one item for each, in the order of all tasks."""
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
        # What hold a model together must go on alike.
        wait = wait or ranks.shard.size > 1
        while (answer := office.answered(self._name, self._tickets, GLANCE if wait else 0)) is None and wait:
            ranks.check_whole()
        if answer is None:
            return None
        self._asked, self._tickets, self._left = False, self._tickets + 1, answer[0] is not None
        return answer[0]
