"""The suffix automaton, against counting by hand."""

import random

import pytest

from grpo.generation.suffixes import ROOT, SuffixAutomaton


def test_what_came_most_often_behind_the_longest_known_context_is_likely() -> None:
    index = SuffixAutomaton()
    for sequence in ([1, 2, 3], [1, 2, 4], [9, 2, 4], [9, 2, 4]):
        index.extend(ROOT, sequence)
    assert index.likely(index.extend(ROOT, [7, 1, 2]), 1) == [4]  # 3 and 4 once each behind 1 2: the newer
    assert index.likely(index.extend(ROOT, [8, 2]), 1) == [4]  # behind 2 alone 4 came three times, 3 once
    index.extend(ROOT, [1, 2, 3])
    assert index.likely(index.extend(ROOT, [6, 1, 2]), 1) == [3]  # now twice behind 1 2


def test_tokens_follow_one_another_as_they_did_before() -> None:
    index = SuffixAutomaton()
    index.extend(ROOT, [1, 2, 3, 4, 5, 6])
    assert index.likely(index.extend(ROOT, [8, 2]), 3) == [3, 4, 5]
    assert index.likely(index.extend(ROOT, [4]), 9)[:2] == [5, 6]


def test_what_followed_a_shorter_context_does_not_count_for_a_longer() -> None:
    index = SuffixAutomaton()
    index.extend(ROOT, [9, 1, 2, 3])
    index.extend(ROOT, [1, 2, 7])
    assert index.likely(index.extend(ROOT, [9, 1, 2]), 1) == [3]


def test_nothing_is_guessed_behind_what_was_never_said() -> None:
    index = SuffixAutomaton()
    assert index.likely(ROOT, 3) == []
    state = index.extend(ROOT, [1, 2, 3])
    assert index.likely(state, 3) == []
    assert index.likely(index.extend(state, [7]), 3) == []


def test_sequences_that_grow_in_turn_know_one_another() -> None:
    index = SuffixAutomaton()
    prompt = index.extend(ROOT, [5, 5, 6])
    first, second = index.extend(prompt, [1]), index.extend(prompt, [2])
    first = index.extend(first, [3, 4])
    second = index.extend(second, [3])
    assert index.likely(second, 1) == [4]  # said by the first behind 3
    assert index.likely(prompt, 1) in ([1], [2])


def test_a_sequence_that_branches_off_shares_the_states_before() -> None:
    index = SuffixAutomaton()
    prompt = index.extend(ROOT, range(50))
    index.extend(prompt, [60, 61])
    before = len(index)
    index.extend(prompt, [60, 61])  # nothing new
    assert len(index) == before


@pytest.mark.parametrize("letters", [2, 3, 6])
def test_it_answers_as_a_search_through_all_sequences_does(letters: int) -> None:
    """Sequences grow in turn; contexts are short enough for all of their counts to be kept."""
    draw = random.Random(letters)
    index, texts = SuffixAutomaton(), [[], [], []]
    states = [ROOT] * 3
    for _ in range(60):
        number = draw.randrange(3)
        token = draw.randrange(letters)
        states[number] = index.extend(states[number], [token])
        texts[number].append(token)
        followers = _behind(texts, texts[number])
        guess = index.likely(states[number], 1)
        assert bool(guess) == bool(followers)
        assert not guess or guess[0] in followers


def _behind(texts: list[list[int]], context: list[int]) -> set[int]:
    """What came behind the longest end of `context` that anything came behind, in any of the texts."""
    for start in range(len(context)):
        end = context[start:]
        found = {
            text[i + len(end)] for text in texts for i in range(len(text) - len(end)) if text[i:][: len(end)] == end
        }
        if found:
            return found
    return set()


def test_a_row_that_repeats_itself_costs_no_more_than_another() -> None:
    index = SuffixAutomaton()
    state = index.extend(ROOT, [3] * 5000)
    assert len(index) == 5001
    assert index.likely(state, 4) == [3] * 4


def test_a_sequence_that_is_followed_is_where_it_would_be_and_adds_nothing() -> None:
    index = SuffixAutomaton()
    index.extend(ROOT, [1, 2, 3, 4, 2, 5])
    states = len(index)
    assert index.follow(ROOT, [1, 2, 3]) == index.extend(ROOT, [1, 2, 3])
    assert index.likely(index.follow(ROOT, [7, 3]), 2) == [4, 2]  # behind 3 alone
    assert index.likely(index.follow(index.follow(ROOT, [1, 2]), [3]), 1) == [4]
    assert index.follow(ROOT, [1, 2, 9]) == ROOT
    assert len(index) == states


def test_what_is_followed_is_likely_what_counting_by_hand_says() -> None:
    """Behind the longest end of a sequence that was said before: what came there most often."""
    draw = random.Random(1)
    said = [draw.randrange(3) for _ in range(60)]
    index = SuffixAutomaton()
    index.extend(ROOT, said)
    for _ in range(200):
        sequence = [draw.randrange(4) for _ in range(draw.randrange(1, 9))]
        guessed = index.likely(index.follow(ROOT, sequence), 1)
        behind: list[int] = []
        for start in range(len(sequence)):
            end = sequence[start:]
            behind = [said[at + len(end)] for at in range(60 - len(end)) if said[at : at + len(end)] == end]
            if behind:
                break
        assert bool(guessed) == bool(behind)
        assert set(guessed) <= set(behind)
