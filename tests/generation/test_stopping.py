"""When completions end: stop tokens, stop strings, lengths, repetitions."""

import pytest

from grpo.backend.random import derive_key
from grpo.generation.generator import Request
from grpo.generation.sampling import Sampling
from grpo.generation.stopping import Stopping, repeats

KEY = derive_key(0, "test")


def letters(ids) -> str:
    return "".join(chr(i) for i in ids)


def ids(text: str) -> list[int]:
    return [ord(c) for c in text]


def stopping(**settings) -> Stopping:
    return Stopping(Sampling(max_tokens=50, **settings), frozenset({0}), letters)


def test_a_stop_string_ends_a_completion_and_is_cut_from_its_text() -> None:
    rule = stopping(stop=("</answer>", "END"))
    assert rule.reason(ids("so 4</answer")) is None
    assert rule.reason(ids("so 4</answer>")) == "stop"
    assert rule.text(ids("so 4</answer>")) == "so 4"
    assert rule.text(ids("an END before </answer>")) == "an "


def test_a_stop_string_waits_for_the_least_length() -> None:
    assert stopping(stop=("x",), min_tokens=3).reason(ids("ax")) is None
    assert stopping(stop=("x",), min_tokens=3).reason(ids("aax")) == "stop"


def test_a_stop_string_before_the_least_length_neither_stops_nor_cuts() -> None:
    rule = stopping(stop=("xy",), min_tokens=4)
    assert rule.reason(ids("xyab")) is None
    assert rule.text(ids("xyab")) == "xyab"
    assert rule.text(ids("xyabcdefgh" * 4)) == "xyabcdefgh"
    assert rule.reason(ids("axxy")) == "stop"  # complete with the fourth token
    assert rule.text(ids("axxy")) == "ax"
    late = stopping(stop=("xy",), min_tokens=30)
    assert late.reason(ids("xy" + "a" * 28)) is None
    assert late.text(ids("xy" + "a" * 28)) == "xy" + "a" * 28


def test_what_may_begin_a_stop_string_is_not_sure_yet() -> None:
    rule = stopping(stop=("END", "NDX"))
    assert rule.sure("the") == 3
    assert rule.sure("the E") == 4
    assert rule.sure("the EN") == 4
    assert rule.sure("the ENx") == 7


def test_stop_tokens_of_the_recipe_join_the_tokenizer_s() -> None:
    rule = stopping(stop_ids=(7,))
    assert rule.reason([65, 7]) == "stop"
    assert rule.text([65, 7]) == "A"
    assert rule.reason([65, 0]) == "stop"


def test_the_text_is_all_turns_and_the_last_ends_before_its_stop_string() -> None:
    """Earlier turns keep theirs: the model read them. Where a turn begins, tokens may decode differently than alone."""
    rule = stopping(stop=("END",)).from_token(8)
    assert rule.text(ids("one END two END")) == "one END two "
    assert rule.turn_text(ids("one END two END")) == "two "
    assert rule.text([*ids("one END two"), 0]) == "one END two"
    assert rule.turn_text(ids("one END two")) == "two"
    assert rule.text(ids("one END ENDs")) == "one END "
    stripped = Stopping(Sampling(max_tokens=50, stop=("END",)), frozenset({0}), lambda ids: letters(ids).lstrip(), 3)
    assert stripped.text(ids("one two END x")) == "one two "


def test_length_comes_last() -> None:
    rule = Stopping(Sampling(max_tokens=2), frozenset({0}), letters)
    assert rule.reason([65]) is None
    assert rule.reason([65, 66]) == "length"
    assert rule.reason([65, 0]) == "stop"


@pytest.mark.parametrize(
    ("text", "times", "found"),
    [
        ("xaaa", 3, True), ("xaa", 3, False), ("aaab", 3, False), ("abab", 2, True), ("abcabcabc", 3, True),
        ("abcabcab", 3, False), ("a", 2, False), ("", 2, False), ("0123456789abcdef" * 2, 2, True),
        ("0123456789abcdefg" * 2, 2, False),
    ],
)  # fmt: skip
def test_repetitions_of_one_token_or_an_n_gram(text: str, times: int, found: bool) -> None:
    assert repeats(ids(text), times) is found


def test_a_row_that_repeats_itself_is_ended(make_policy) -> None:
    toy = make_policy()
    toy.generator.stop_ids = frozenset()
    free = toy.generator.generate([Request([5, 6])], Sampling(0.0, 60), KEY)[0][0]
    guarded = toy.generator.generate([Request([5, 6])], Sampling(0.0, 60, max_repeats=3), KEY)[0][0]
    assert repeats(free.token_ids, 3)  # a model that has learnt nothing goes round in circles
    assert guarded.finish_reason == "repetition"
    assert guarded.token_ids == free.token_ids[: len(guarded.token_ids)]


def test_a_stop_string_of_the_model_s_own_text(make_policy) -> None:
    toy = make_policy()
    toy.generator.stop_ids = frozenset()
    (free,) = toy.generator.generate([Request([5, 6])], Sampling(1.0, 20), KEY)[0]
    wanted = free.text[4:6]
    (stopped,) = toy.generator.generate([Request([5, 6])], Sampling(1.0, 20, stop=(wanted,)), KEY)[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(wanted)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < 20


@pytest.mark.parametrize("least", [0, 3])
def test_a_stream_shows_nothing_of_a_stop_string(make_policy, least: int) -> None:
    toy = make_policy()
    toy.generator.stop_ids = frozenset()
    free = toy.generator.generate([Request([5, 6])], Sampling(1.0, 20), KEY)[0][0].text
    for wanted in (free[4:6], free[3:9], free[0:2]):
        sampling = Sampling(1.0, 20, stop=(wanted,), min_tokens=least)
        (whole,) = toy.generator.generate([Request([5, 6])], sampling, KEY)[0]
        events = list(toy.generator.stream(Request([5, 6]), sampling, KEY))
        assert "".join(event.text for event in events) == whole.text
        assert tuple(event.token_id for event in events) == whole.token_ids


def test_special_tokens_have_no_text_in_a_stream_either(make_policy) -> None:
    toy = make_policy()
    toy.generator.stop_ids = frozenset()
    events = list(toy.generator.stream(Request([5, 6]), Sampling(temperature=50.0, max_tokens=400), KEY))
    special = {i for i, added in toy.tokenizer.added_tokens_decoder.items() if added.special}
    silent = [event.text for event in events if event.token_id in special]
    assert silent
    assert not any("<|" in text for text in silent)
