"""Where drafts come from, and what is remembered for them."""

import time

from spoken import ended, row_of

from grpo.generation.drafts import Drafts, History
from grpo.generation.replay import Taken, replay
from grpo.generation.rows import SharedPrompt

PROMPT = (1, 2, 3)


def test_a_row_says_again_what_its_prompt_says() -> None:
    row = row_of(SharedPrompt((1, 50, 51, 52, 53, 3)), [9, 50])
    assert Drafts().propose(row, 3) == [51, 52, 53]


def test_a_sibling_that_is_ahead_is_followed() -> None:
    drafts, prompt = Drafts(), SharedPrompt(PROMPT, n=2)
    ahead, behind = row_of(prompt, [10, 11, 12, 13]), row_of(prompt, [10])
    drafts.propose(ahead, 3)
    assert drafts.propose(behind, 3) == [11, 12, 13]
    before = len(drafts.group(prompt).index)
    ahead.token_ids += [14, 15]
    behind.token_ids += [11, 12, 13]
    drafts.propose(ahead, 3)
    assert drafts.propose(behind, 3) == [14, 15]
    assert len(drafts.group(prompt).index) == before + 2  # only what is new was taken in


def test_what_a_tool_returned_is_followed() -> None:
    row = row_of(SharedPrompt(PROMPT), [20])
    row.inject([70, 71, 72])
    row.token_ids += [30, 70]
    assert Drafts().propose(row, 2) == [71, 72]


def test_an_earlier_completion_of_the_prompt_is_followed_from_its_first_token_on() -> None:
    drafts = Drafts()
    ended([40, 41, 42], PROMPT, drafts)
    ended([80, 81], (7, 8), drafts)
    row = row_of(SharedPrompt(PROMPT))
    assert drafts.group(row.prompt).past
    assert drafts.propose(row, 3) == [40, 41, 42]


def test_a_new_prompt_begins_with_what_others_said() -> None:
    drafts = Drafts()
    ended([80, 81, 82], (7, 8, 9), drafts)
    row = row_of(SharedPrompt((5, 6, 9)))  # ends as the other prompt does
    assert not drafts.group(row.prompt).seen
    assert drafts.propose(row, 3) == [80, 81, 82]
    ended([90], PROMPT, drafts)
    again = row_of(SharedPrompt(PROMPT), [80])
    assert drafts.propose(again, 3) == []  # one that is known has its own alone


def test_a_group_does_not_draft_from_what_came_after_it_began() -> None:
    """Its own rows are in the index already; remembered, they would count twice."""
    drafts, prompt = Drafts(), SharedPrompt(PROMPT, n=2)
    first = row_of(prompt, [10, 11])
    drafts.group(prompt)
    drafts.remember(first)
    assert drafts.group(prompt).past == []
    prompt.left = 0
    assert drafts.group(SharedPrompt(PROMPT)).seen


def test_the_parts_of_a_group_in_two_lanes_know_one_another() -> None:
    drafts = Drafts()
    here, there = row_of(SharedPrompt(PROMPT), [10, 11, 12]), row_of(SharedPrompt(PROMPT), [10])
    drafts.propose(here, 2)
    assert drafts.propose(there, 2) == [11, 12]
    assert drafts.group(here.prompt) is drafts.group(there.prompt)


def test_groups_whose_rows_have_left_are_forgotten() -> None:
    drafts, prompt = Drafts(), SharedPrompt(PROMPT)
    former = drafts.group(prompt)
    prompt.left = 0
    drafts.group(SharedPrompt((7,)))
    assert drafts.group(prompt) is not former


def test_memory_keeps_the_newest_completions_of_a_prompt() -> None:
    memory = History()
    for number in range(12):
        memory.add(PROMPT, [number, 5])
    assert [list(one) for one in memory.of(PROMPT)] == [[number, 5] for number in range(4, 12)]


def test_a_further_turn_takes_the_place_of_the_former() -> None:
    memory = History()
    memory.add(PROMPT, [1, 2])
    memory.add(PROMPT, [1, 2, 3, 4])
    memory.add(PROMPT, [1, 2, 3, 4])  # another row that said the same
    assert [list(one) for one in memory.of(PROMPT)] == [[1, 2, 3, 4]] * 2


def test_memory_forgets_the_prompts_unused_for_longest() -> None:
    memory = History(tokens=10)
    memory.add((1,), [0] * 4)
    memory.add((2,), [0] * 4)
    memory.add((1,), [1])
    memory.add((3,), [0] * 4)
    assert [bool(memory.of((number,))) for number in (1, 2, 3)] == [True, False, True]
    memory.add((4,), [0] * 11)
    assert not any(memory.of((number,)) for number in range(5))
    memory.add((5,), [0] * 10)
    assert memory.of((5,))


def test_a_replay_takes_what_speculation_would() -> None:
    drafts = Drafts()
    ended([10, 11, 12, 13, 14, 15], PROMPT, drafts)
    prompt = SharedPrompt(PROMPT)
    row = row_of(prompt, [10, 11, 12, 99, 98, 97])
    group = drafts.group(prompt)
    # 10 11 12 are drafts that are right, and 99 comes with them; 98 and 97 come alone.
    assert replay(group, [row], 8) == (6, 3)
    assert replay(group, [row], 4) == (6, 3)
    assert replay(group, [row], 2) == (6, 4)  # 10 11, 12 99, 98, 97
    same = row_of(prompt, [10, 11, 12, 13, 14, 15])
    assert replay(group, [same], 8) == (6, 1)
    assert replay(group, [same], 4) == (6, 2)


def test_a_replay_that_takes_too_long_breaks_off() -> None:
    row = row_of(SharedPrompt(PROMPT), [10, 11, 12])
    assert replay(Drafts().group(row.prompt), [row], 2, until=time.perf_counter()) == (0, 0)


def test_an_index_begins_with_what_was_said_before() -> None:
    drafts = Drafts()
    ended([10, 11, 12], (1, 2), drafts)
    assert drafts.group(SharedPrompt((1, 2))).background == 5
    assert drafts.group(SharedPrompt((3,))).background == 6  # the other prompt and what followed, and its own


def test_in_a_replay_rows_learn_from_the_rows_beside_them() -> None:
    prompt = SharedPrompt(PROMPT, n=2)
    rows = [row_of(prompt, [10, 11, 12, 10, 11, 12]), row_of(prompt, [20, 10, 11, 12])]
    sampled, turns = replay(Drafts().group(prompt), rows, 4)
    assert sampled == 10
    assert turns < 10


def test_a_replay_leaves_out_a_row_that_has_said_nothing_yet() -> None:
    prompt = SharedPrompt(PROMPT, n=2)
    rows = [row_of(prompt, [10, 11]), row_of(prompt)]
    assert replay(Drafts().group(prompt), rows, 2) == (2, 2)


def test_a_replay_does_not_count_what_was_not_sampled() -> None:
    drafts, prompt = Drafts(), SharedPrompt(PROMPT)
    row = row_of(prompt, [20])
    row.inject([70, 71, 72])
    row.token_ids += [30]
    assert replay(drafts.group(prompt), [row], 4) == (2, 2)
    ended(row.token_ids, (4, 4), drafts)
    ended(row.token_ids, PROMPT, drafts)
    again = row_of(SharedPrompt(PROMPT), [20])
    again.inject([70, 71, 72])
    again.token_ids += [30]
    # The draft behind 20 is what the tool returns: no row draws that.
    assert replay(drafts.group(again.prompt), [again], 4) == (2, 2)


def test_a_further_replay_counts_what_is_new() -> None:
    drafts, prompt = Drafts(), SharedPrompt(PROMPT)
    row = row_of(prompt, [10, 11, 12, 10])
    group = drafts.group(prompt)
    assert replay(group, [row], 2) == (4, 4)
    group.replayed = {row: 4}
    row.token_ids += [11, 12]
    assert replay(group, [row], 2) == (2, 1)


def test_old_turns_count_less() -> None:
    taken = Taken()
    assert taken.mean == 1
    taken.add(3000, 1000)
    assert taken.mean == 3
    for _ in range(10):
        taken.add(1000, 1000)
    assert taken.mean is not None
    assert 1 < taken.mean < 1.05
