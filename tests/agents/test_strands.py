"""The rows of an agent's rollout, without a server or a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from grpo.agents.strands import KEPT, Strand, gone_on_with, idle, in_order


def strand(prompt: list[int], answer: list[int], wave: int = 0, state: str = "waiting", cut: int = 0) -> Strand:
    """One that was answered all but the last `cut` of its tokens."""
    row: Any = SimpleNamespace(token_ids=answer, state=state)
    return Strand(row, tuple(prompt), 99, wave, decoding=False, answered=len(answer) - cut)


def test_the_longest_that_a_prompt_goes_on_from() -> None:
    other, short, long = strand([1, 2], [9, 9, 9]), strand([1, 2], [3]), strand([1, 2], [3, 4, 5])
    strands = [other, short, long]
    assert gone_on_with(strands, [1, 2, 3, 4, 5, 6]) is long
    assert gone_on_with(strands, [1, 2, 3, 4, 5]) is short  # the same and nothing more is asked for anew
    assert gone_on_with(strands, [1, 2, 3, 7]) is short
    assert gone_on_with(strands, [1, 2, 3]) is None
    assert gone_on_with(strands, [1, 7, 3, 4]) is None
    assert gone_on_with([strand([1, 2], [])], [1, 2, 3]) is None


def test_of_two_alike_the_one_that_can_go_on() -> None:
    gone, there = strand([1], [2], state="released"), strand([1], [2])
    assert gone_on_with([gone, there], [1, 2, 3]) is there
    assert gone_on_with([there, gone], [1, 2, 3]) is there
    assert gone_on_with([gone], [1, 2, 3]) is gone


def test_what_was_not_answered_does_not_count() -> None:
    """A row that was cut off in its second turn ends where its first did, and cannot go on itself."""
    cut = strand([1], [2, 3, 4], cut=2)
    assert gone_on_with([cut], [1, 2, 9]) is cut
    assert not cut.goes_on


def test_the_newest_few_are_kept() -> None:
    strands = [strand([place], [1]) for place in range(KEPT + 2)]
    strands.insert(1, strand([7], [1], state="done"))
    assert [one.prompt_ids for one in idle(strands)] == [(0,), (1,)]
    assert idle(strands[-KEPT:]) == []


def test_the_order_is_not_that_of_the_clock() -> None:
    first, second = strand([5], [1]), strand([2], [1], wave=1)
    third, nothing = strand([1], [1], wave=1), strand([0], [], wave=1)
    assert in_order([first, second, nothing, third]) == [first, third, second]
