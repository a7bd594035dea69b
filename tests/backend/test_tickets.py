"""Tickets: each task's number is given once, to whoever asks, around a ring of processes."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from backend.test_watch import listen, ring, sockets  # noqa: F401  a fixture that closes the links

from grpo.backend.ranks import Ranks
from grpo.backend.tickets import Deal, TicketOffice
from grpo.backend.watch import Watch
from grpo.errors import LostRankError

NAME = [0, 1]


def asked(watches: list[Watch], rank: int, number: int, total: int, name: list[int] = NAME, taker: int | None = None):
    """The ticket that a process gets, once all have passed on what they heard."""
    office = watches[rank].tickets
    office.ask(name, rank if taker is None else taker, number, 2, total)
    for _ in range(2 * len(watches)):
        if (answer := office.answered(name, number, 0)) is not None:
            return answer[0]
        listen(*watches)
    raise AssertionError("no answer came")


@pytest.mark.parametrize("size", [2, 3, 5])
def test_each_number_is_given_once_to_any_process_of_a_ring(size: int) -> None:
    watches = ring(size)
    got = [asked(watches, rank, number, 9) for number in range(2) for rank in range(size)]
    assert got == [2 + n if 2 + n < 9 else None for n in range(2 * size)]


@pytest.mark.parametrize(("rank", "passed"), [(1, []), (2, [1]), (3, [4]), (4, [])])
def test_a_question_goes_the_shorter_way_around(rank: int, passed: list[int], monkeypatch) -> None:
    hear, heard = TicketOffice.hear, []

    def noted(self: TicketOffice, link: Any, message: dict[str, Any]) -> None:
        heard.extend([self.rank] if "ask" in message else ())
        hear(self, link, message)

    monkeypatch.setattr(TicketOffice, "hear", noted)
    asked(ring(5), rank, 0, 9)
    assert heard == [*passed, 0]


def test_those_who_hold_a_model_together_get_the_same_ticket() -> None:
    watches = ring(4)
    assert [asked(watches, rank, 0, 9, taker=rank // 2) for rank in range(4)] == [2, 2, 3, 3]
    assert [asked(watches, rank, 1, 4, taker=rank // 2) for rank in (3, 2, 1, 0)] == [None] * 4


def test_another_deal_begins_anew_and_a_late_answer_is_not_taken_for_its() -> None:
    first = TicketOffice(0, 2, [])
    first.ask(NAME, 0, 0, 2, 9)  # of a rollout that was interrupted
    first.ask([0, 2], 0, 0, 4, 9)
    assert first.answered([0, 2], 0, 0) == (4,)
    assert first.answered([0, 2], 1, 0) is None


class Beside(Ranks):
    """One of several processes whose exchanges are given."""

    def __init__(self, rank: int, watch: Watch, *gathered: list[Any]) -> None:
        super().__init__()
        self.rank, self.size, self.watch, self._gathered = rank, watch.size, watch, list(gathered)

    def gather(self, mine: Any) -> list[Any]:
        return self._gathered.pop(0)


def test_a_process_begins_with_its_share_and_goes_on_by_ticket() -> None:
    watches = ring(2)
    met = [(2, NAME), (1, NAME)]  # the other has room for one task at a time
    deal, other = (Deal.of(Beside(rank, watches[rank], met), 7, room) for rank, room in ((0, 2), (1, 1)))
    assert (deal.begin, other.begin) == ([0], [1])
    assert [deal.take(False) for _ in range(4)] == [0, 2, 3, 4]
    assert [other.take(False), other.take(False)] == [1, None]
    assert other.goes_on
    listen(*watches, *watches)
    assert other.take(False) == 5
    assert [deal.take(True), deal.take(True), deal.goes_on] == [6, None, False]
    assert other.take(False) is None
    listen(*watches, *watches)
    assert other.take(True) is None
    assert not other.goes_on
    assert sorted(chain(deal.taken, other.taken)) == list(range(7))


@pytest.mark.parametrize(("total", "rooms"), [(7, (4, 9)), (2, (1, 1)), (1, (0, 0))])
def test_where_all_have_room_for_their_shares_the_clock_decides_nothing(total: int, rooms: tuple[int, int]) -> None:
    watches = ring(2)
    met = [(room, NAME) for room in rooms]
    deals = [Deal.of(Beside(rank, watches[rank], met), total, rooms[rank]) for rank in range(2)]
    assert [deal.begin for deal in deals] == [list(range(rank, total, 2)) for rank in range(2)]
    for deal in deals:
        assert [deal.take(True) for _ in deal.begin] == deal.begin
        assert not deal.goes_on


def test_without_links_each_process_has_its_share() -> None:
    class Unlinked(Ranks):
        size = 2

    ranks = Unlinked()
    ranks.rank, ranks.size = 1, 2
    deal = Deal.of(ranks, 5, 1)
    assert deal.begin == [1, 3]


def test_alone_a_process_takes_all_tasks_at_once() -> None:
    deal = Deal.of(Ranks(), 3, 1)
    assert deal.begin == [0, 1, 2]
    assert [deal.take(False) for _ in range(3)] == [0, 1, 2]
    assert not deal.goes_on
    assert deal.merge("abc") == ["a", "b", "c"]


def test_what_all_have_made_comes_together_in_the_order_of_tasks() -> None:
    watches = ring(2)
    ranks = Beside(1, watches[1], [[(0, "a"), (3, "d"), (2, "c")], [(1, "b")]])
    deal = Deal([1], ranks)
    deal.take(False)
    assert deal.merge(["b"]) == ["a", "b", "c", "d"]


def test_who_waits_for_a_ticket_hears_of_a_loss() -> None:
    watches = ring(2)
    ranks = Beside(1, watches[1])
    deal = Deal([], ranks, NAME, 9)
    watches[1]._lose(0, "died")
    with pytest.raises(LostRankError, match="died"):
        deal.take(True)
