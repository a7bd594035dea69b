"""Keys and values that an ended row leaves: a later prompt that begins alike goes on from them, to the same tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from ways import LONG, WAYS, asked, finish, generator_of, sampled

from grpo.generation.generator import Generator
from grpo.generation.rows import Computed, Row, Submission
from grpo.generation.sampling import Sampling

NEXT = (90, 91, 92)
"""What follows an answer."""
CUT = ("joined layers", "joined layers, fused rows", "the model's layers", "overlapping steps")
"""Ways whose keys and values can be cut."""


class Fed:
    """Counts the tokens that go through a model's own forward pass, as those of prompts do, but for padding."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 0
        call = type(model).__call__

        def counted(this: Any, inputs: mx.array, *rest: Any, **named: Any) -> Any:
            if inputs.dtype == mx.int32 and inputs.shape[1] > 1:  # a head that was split off is called with others
                self.tokens += int((inputs != 0).sum())
            return call(this, inputs, *rest, **named)

        monkeypatch.setattr(type(model), "__call__", counted)


def submission(prompt: tuple[int, ...], tokens: int = 12, **how: Any) -> Submission:
    return asked(prompt, sampling=Sampling(1.0, tokens), keep=False, **how)


def answered(generator: Generator, *submissions: Submission) -> list[Row]:
    with generator.open() as engine:
        rows = [row for one in submissions for row in engine.submit(one)]
        finish(engine)
    return rows


def known_of(row: Row) -> Computed:
    assert row.computed is not None
    return row.computed


@pytest.mark.each_value
@pytest.mark.parametrize("stops", [True, False], ids=["stopped", "at its limit"])
@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_goes_on_from_what_is_known_with_the_same_tokens(
    way: str, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = generator_of(way, slots=4)
    generator.stop_ids = frozenset(range(40)) if stops else frozenset()
    (first,) = answered(generator, submission(LONG, remember=True))
    assert first.finish_reason == ("stop" if stops else "length")
    known, history = known_of(first), (*LONG, *first.token_ids)
    assert tuple(known.token_ids) == history[: len(known.token_ids)]
    assert len(known.token_ids) >= len(history) - 2  # all but what may not have been fed
    again = (*history, *NEXT)
    (expected,) = answered(generator, submission(again))
    assert expected.computed is None  # nobody asked for it
    fed = Fed(generator.model, monkeypatch)
    for _ in range(2):  # what is known can be used again
        fed.tokens = 0
        (found,) = answered(generator, submission(again, known=known, remember=True))
        assert sampled([found]) == sampled([expected])
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        assert fed.tokens <= len(NEXT) + 1
    assert len(known_of(found).token_ids) >= len(again) + len(found.token_ids) - 2


@pytest.mark.parametrize("way", CUT)
def test_a_prompt_that_leaves_the_history_goes_on_from_where_it_does(way: str) -> None:
    generator = generator_of(way, slots=2)
    (first,) = answered(generator, submission(LONG, remember=True))
    other = (*LONG[:-4], 70, 71, 72, 73, 74, 75)
    known = known_of(first)
    assert known.usable(other) == len(LONG) - 4
    expected, found = answered(generator, submission(other), submission(other, known=known))
    assert sampled([found]) == sampled([expected])
    (shorter,) = answered(generator, submission(LONG[:5], known=known))
    assert sampled([shorter]) == sampled(answered(generator, submission(LONG[:5])))
    (unlike,) = answered(generator, submission((99, *LONG), known=known))
    assert sampled([unlike]) == sampled(answered(generator, submission((99, *LONG))))


@pytest.mark.parametrize("way", ["recurrent state", "sliding windows", "row by row"])
def test_states_that_cannot_be_cut_serve_only_prompts_that_hold_them_whole(way: str) -> None:
    generator = generator_of(way, slots=2)
    (first,) = answered(generator, submission(LONG, remember=True))
    other = (*LONG[:-4], 70, 71, 72, 73, 74, 75)
    assert known_of(first).usable(other) == 0
    expected, found = answered(generator, submission(other), submission(other, known=known_of(first)))
    assert sampled([found]) == sampled([expected])


@pytest.mark.parametrize("way", ["joined layers", "overlapping steps", "recurrent state"])
def test_rows_remember_while_others_decode_in_few_slots_and_lanes(way: str) -> None:
    generator = generator_of(way, slots=3)
    prompts = [(*LONG[: 5 + n], 60 + n) for n in range(7)]
    lengths = [3, 14, 6, 9, 2, 11, 5]
    ones = [submission(p, t, seed=n, remember=True) for n, (p, t) in enumerate(zip(prompts, lengths, strict=True))]
    rows = answered(generator, *ones)
    nexts = [
        submission((*p, *row.token_ids, *NEXT), seed=n) for n, (p, row) in enumerate(zip(prompts, rows, strict=True))
    ]
    expected = sampled(answered(generator, *nexts))
    going_on = [replace(one, known=known_of(row)) for one, row in zip(nexts, rows, strict=True)]
    assert sampled(answered(generator, *going_on)) == expected
    if way == "joined layers":
        generator.lanes = 2
        rows = answered(generator, *ones)
        going_on = [replace(one, known=known_of(row)) for one, row in zip(nexts, rows, strict=True)]
        assert sampled(answered(generator, *going_on)) == expected


def test_several_rows_of_a_prompt_go_on_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = generator_of("joined layers", slots=4)
    (first,) = answered(generator, submission(LONG, remember=True))
    again = (*LONG, *first.token_ids, *NEXT)
    expected = sampled(answered(generator, submission(again, n=3)))
    assert sampled(answered(generator, submission(again, n=3, known=known_of(first)))) == expected


def test_what_was_released_leaves_nothing() -> None:
    generator = generator_of("joined layers", slots=2)
    with generator.open() as engine:
        one, other = (engine.submit(submission(LONG, 40, remember=True))[0] for _ in range(2))
        engine.step()
        engine.step()
        engine.release(one)
        finish(engine)
    assert one.computed is None
    assert other.computed is not None


def test_another_kind_of_session_does_not_take_it() -> None:
    (first,) = answered(generator_of("joined layers", slots=1), submission(LONG, remember=True))
    again = (*LONG, *first.token_ids, *NEXT)
    generator = generator_of("batch caches", slots=1)
    expected = sampled(answered(generator, submission(again)))
    assert sampled(answered(generator, submission(again, known=known_of(first)))) == expected
