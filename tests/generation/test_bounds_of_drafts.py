"""The memory behind drafts has bounds, whatever rows say; short of memory, drafts come from what was said before."""

import random

import pytest
from spoken import ended, row_of

from grpo.generation import drafts as module
from grpo.generation.drafts import INDEXED, Drafts
from grpo.generation.rows import SharedPrompt

PROMPT = (1, 2, 3)


def states(drafts: Drafts) -> int:
    """In all indices together, counted afresh."""
    return sum(group.size for group in set(drafts._groups.values()))


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch):
    def drafts(states: int) -> Drafts:
        monkeypatch.setattr(module, "INDEXED", states)
        return Drafts()

    return drafts


def test_a_new_group_has_drafts_once_others_have_left(bounded) -> None:
    drafts = bounded(18)
    first, second = row_of(SharedPrompt((1, 2, 3, 4, 5, 1, 2, 3)), [1]), row_of(SharedPrompt((6, 7, 8)), [6])
    drafts.propose(first, 2)
    first.token_ids += [9, 10, 11]
    assert drafts.propose(second, 2) == [7, 8]
    third = row_of(SharedPrompt((16, 17, 18)), [16])
    assert drafts.propose(third, 2) == []  # no room for its index
    first.prompt.left = second.prompt.left = 0
    drafts.group(SharedPrompt((9,)))
    assert drafts.propose(third, 2) == [17, 18]


def test_indices_grow_no_further_however_much_rows_say(bounded) -> None:
    drafts, draw = bounded(400), random.Random(0)
    rows = [row_of(prompt) for prompt in (SharedPrompt((number, 7), n=2) for number in range(6)) for _ in range(2)]
    for _ in range(60):
        for row in rows:
            row.token_ids += [draw.randrange(50) for _ in range(draw.randrange(1, 4))]
            drafts.propose(row, 3)
            assert states(drafts) <= 400
    assert states(drafts) > 300
    assert drafts._indexed == states(drafts)


def test_a_row_that_is_taken_in_no_more_is_still_followed(bounded) -> None:
    drafts = bounded(60)
    ended([40, 41, 42, 43, 44, 45], PROMPT, drafts)
    row = row_of(SharedPrompt(PROMPT), [40])
    assert drafts.propose(row, 2) == [41, 42]
    row.token_ids += [90] * 40  # more than there is room for
    assert drafts.propose(row, 2) == []
    row.token_ids += [42, 43]
    assert drafts.propose(row, 2) == [44, 45]
    group = drafts.group(row.prompt)
    assert not group.grows
    before = group.size
    row.token_ids += [50]  # there is room for this, but not behind what is missing
    assert drafts.propose(row, 2) == []
    row.token_ids += [50]
    assert (drafts.propose(row, 2), group.size) == ([], before)


def test_an_index_begins_with_the_newest_completions_that_half_the_room_holds(bounded) -> None:
    drafts = bounded(4 * (3 + 2 * 6))
    for number in range(4):
        ended([number] * 6, PROMPT, drafts)
    group = drafts.group(SharedPrompt(PROMPT))
    assert [list(one) for one in group.past] == [[2] * 6, [3] * 6]
    for number in range(4):
        ended([number] * 4, (7, 8, 9), drafts)
    others = drafts.group(SharedPrompt((4, 5, 6))).others  # each with the three tokens before it
    assert [list(completion) for _, completion in others] == [[3] * 4]
    assert drafts.group(SharedPrompt(tuple(range(99)))).others == []  # a prompt without room for itself


def test_long_completions_of_many_rows_stay_within_the_bound() -> None:
    """64 rows of 8,000 tokens, read in large pieces, of a prompt's group and of many."""
    drafts, draw = Drafts(), random.Random(0)
    phrases = [[draw.randrange(5000) for _ in range(400)] for _ in range(40)]
    rows = [row_of(prompt) for prompt in (SharedPrompt((number,), n=8) for number in range(8)) for _ in range(8)]
    for _ in range(20):
        for row in rows:
            row.token_ids += draw.choice(phrases)
            drafts.propose(row, 7)
    assert INDEXED / 2 < states(drafts) <= INDEXED


def test_what_an_index_begins_with_counts_before_what_a_row_has_said_by_then(bounded) -> None:
    drafts = bounded(24)
    row = row_of(SharedPrompt((1, 2, 3, 4, 5)), range(10, 20))
    drafts.propose(row, 3)  # 6 states, and 18 are left: ten tokens may need 20
    assert drafts.group(row.prompt).size == 6
