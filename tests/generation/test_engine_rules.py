"""What rows of the engine may and may not do, and what its events say."""

import pytest
from ways import LONG, STOPS, asked, finish, fresh, generator_of, sampled

from grpo.backend import cuda
from grpo.backend.random import derive_key
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling

KEY = derive_key(0, "test")


@pytest.fixture
def generator() -> Generator:
    return generator_of("joined layers", 4)


def ended(generator: Generator, **changes):
    """An engine with a row that has ended and waits."""
    engine = generator.open()
    (row,) = engine.submit(asked(LONG, **changes))
    finish(engine)
    return engine, row


def test_events_say_what_the_rows_have(generator: Generator) -> None:
    engine = generator.open()
    plain = engine.submit(asked((9, 10), n=3, logprobs=False))
    cut = engine.submit(asked((11,), 2, n=3, sampling=Sampling(0.9, 30, top_k=20)))
    told: dict = {row: ([], [], []) for row in (*plain, *cut)}
    reasons = {}
    while engine.busy:
        events = engine.step()
        for token in events:
            ids, logprobs, sampler_logprobs = told[token.row]
            ids.append(token.token_id)
            logprobs += [] if token.logprob is None else [token.logprob]
            sampler_logprobs += [] if token.sampler_logprob is None else [token.sampler_logprob]
            assert token.finish_reason == events.ended.get(token.row)
        assert not reasons.keys() & events.ended.keys()
        reasons |= events.ended
    assert told == {row: (row.token_ids, row.logprobs, row.sampler_logprobs) for row in told}
    assert reasons == {row: row.finish_reason for row in told}
    assert not any(row.logprobs or row.sampler_logprobs for row in plain)
    assert all(len(row.logprobs) == len(row.sampler_logprobs) == len(row.token_ids) for row in cut)


@pytest.mark.parametrize("way", ["joined layers", "overlapping steps"])
def test_parking_a_row_loses_no_event(way: str) -> None:
    generator = generator_of(way, 4)
    engine = generator.open()
    rows = engine.submit(asked((9, 10), n=4))
    told: dict = {row: [] for row in rows}
    for step in range(200):
        for token in engine.step():
            told[token.row].append(token.token_id)
        if (row := rows[step % 4]).state == "decoding":
            engine.park(row)
        if (row := rows[(step + 2) % 4]).state == "parked":
            engine.extend(row, ())
    assert all(row.finish_reason is not None for row in rows)
    assert told == {row: row.token_ids for row in rows}


def test_rows_that_go_on_come_before_those_that_have_not_begun(generator: Generator) -> None:
    generator.slots = 1
    engine = generator.open()
    first, *later = engine.submit(asked((9, 10), n=3))
    while first.state != "waiting":
        engine.step()
    engine.extend(first, [50])
    while first.state != "waiting":
        engine.step()
    assert later[1].state == "queued"


def test_rows_of_several_ways_of_sampling_decode_together(generator: Generator) -> None:
    ways = [
        Sampling(1.0, 40),
        Sampling(0.0, 30),
        Sampling(1.5, 20, top_k=30, min_tokens=5),
        Sampling(0.8, 25, repetition_penalty=1.5),
        Sampling(1.0, 40, stop_ids=tuple(range(60, 100))),
    ]
    submissions = [asked((9, 10 + i), i, n=2, sampling=sampling) for i, sampling in enumerate(ways)]
    expected = []
    for submission in submissions:
        engine = generator.open()
        rows = engine.submit(submission)
        finish(engine)
        expected.append((sampled(rows), [row.sampler_logprobs for row in rows]))
    engine = generator.open()
    found = []
    for submission in submissions:
        found.append(engine.submit(submission))
        engine.step()
    finish(engine)
    for rows, (ids, sampler_logprobs) in zip(found, expected, strict=True):
        assert sampled(rows) == ids
        assert [row.sampler_logprobs for row in rows] == [pytest.approx(each, abs=1e-5) for each in sampler_logprobs]


def test_a_penalty_sees_all_that_came_before(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "available", lambda: False)  # `fresh` counts its draws on by stock operations' keys
    engine, row = ended(generator, sampling=Sampling(0.7, 90, repetition_penalty=3.0))
    engine.extend(row, [50, 51, 52])
    finish(engine)
    other = fresh(generator, row, LONG)
    assert row.token_ids[row.injected[0].stop :] == other.token_ids
    assert row.sampler_logprobs[row.injected[0].stop :] == pytest.approx(other.sampler_logprobs, abs=1e-4)


def test_what_was_injected_ends_nothing(generator: Generator) -> None:
    """Neither by stop tokens nor by strings nor by repeating itself, alone or together with what is sampled next."""
    sampling = Sampling(1.0, 400, stop=("55 5",), max_repeats=3)
    engine, row = ended(generator, sampling=sampling)
    injected = [2, *[55, 55, 56] * 3, 5, 7, *[60] * 10]
    engine.extend(row, injected)
    begin = len(row.token_ids)
    finish(engine)
    turn = row.token_ids[begin:]
    assert turn
    for end in range(1, len(turn)):  # nothing that would end the turn is in it before its end
        assert turn[end - 1] not in STOPS
        assert not (end >= 3 and len(set(turn[end - 3 : end])) == 1)
    assert row.stopping.turn_text(row.token_ids) == " ".join(map(str, turn[:-1] if turn[-1] in STOPS else turn))
    assert row.trained == [token not in range(begin - len(injected), begin) for token in range(len(row.token_ids))]
    assert row.logprobs[begin - len(injected) : begin] == [0.0] * len(injected)


def test_a_stop_string_does_not_reach_into_what_was_injected(generator: Generator) -> None:
    sampling = Sampling(1.0, 100, stop=("55 5",))
    for seed in range(3):
        engine = generator.open()
        (row,) = engine.submit(asked(LONG, seed, sampling=sampling))
        finish(engine)
        engine.extend(row, [55, 56])  # whose text has the string
        begin = len(row.token_ids)
        finish(engine)
        turn = row.token_ids[begin:]
        assert turn[-1] in STOPS or "55 5" in " ".join(map(str, turn)) or row.finish_reason == "length"


def test_min_tokens_counts_from_the_prompt_and_a_turn_may_stop_at_once(generator: Generator) -> None:
    generator.stop_ids = frozenset(range(128))
    engine, row = ended(generator, sampling=Sampling(1.0, 50, stop_ids=tuple(range(127))))
    assert len(row.token_ids) == 1
    engine.extend(row, [100])
    finish(engine)
    assert len(row.token_ids) == 3
    late = Sampling(5.0, 50, min_tokens=6, stop_ids=tuple(range(127)))  # the only other token is 127
    generator.stop_ids = frozenset()
    engine, row = ended(generator, sampling=late)
    assert row.token_ids[:6] == [127] * 6
    engine.extend(row, [100])
    begin = len(row.token_ids)
    finish(engine)
    assert any(token != 127 for token in row.token_ids[begin:])


def test_the_limit_counts_all_tokens_after_the_prompt(generator: Generator) -> None:
    engine, row = ended(generator, sampling=Sampling(1.0, 60))
    n = len(row.token_ids)
    assert row.room == 60 - n - 1
    with pytest.raises(ValueError, match=rf"has {n} tokens .*limit is 60, .*: {60 - n} more .*, at most {59 - n} do"):
        engine.extend(row, [50] * (60 - n))
    engine.extend(row, [50] * row.room)
    finish(engine)
    assert len(row.token_ids) == 60
    assert row.finish_reason in ("length", "stop")
    assert row.state == "done"
    with pytest.raises(ValueError, match="has reached its limit of 60 tokens, so it cannot be extended"):
        engine.extend(row, [50])
    assert not engine.busy


def test_wrong_use_is_told_in_a_sentence(generator: Generator) -> None:
    engine = generator.open()
    with pytest.raises(ValueError, match="a prompt needs at least one token"):
        engine.submit(asked(()))
    with pytest.raises(ValueError, match="max_tokens is 0: a row needs room"):
        engine.submit(asked((5,), sampling=Sampling(1.0, 0)))
    (row,) = engine.submit(asked((5, 6)))
    with pytest.raises(ValueError, match=r"this row is still queued or decoding, so it cannot be .*: wait .* or park"):
        engine.extend(row, [9])  # it has not begun yet
    engine.step()
    with pytest.raises(ValueError, match="this row is still queued or decoding"):
        engine.extend(row, [9])
    finish(engine)
    with pytest.raises(ValueError, match="extend it by at least one token"):
        engine.extend(row, [])
    engine.park(row)  # it is out of its slot
    assert row.state == "waiting"
    engine.release(row)
    engine.release(row)
    for use in (lambda: engine.extend(row, [9]), lambda: engine.park(row)):
        with pytest.raises(ValueError, match=r"this row was released, so it cannot be (extended|parked)"):
            use()
    (lost,) = engine.submit(asked((5, 6), keep=False))
    finish(engine)
    for use in (lambda: engine.extend(lost, [9]), lambda: engine.park(lost)):
        with pytest.raises(ValueError, match=r"was not kept, so it cannot be .*: submit it with keep=True"):
            use()


def test_calls_do_not_meddle_with_an_engine_s_rows(generator: Generator) -> None:
    expected = generator.generate([Request((9, 10), 2)], Sampling(1.0, 30), KEY)
    engine = generator.open()
    (row,) = engine.submit(asked(LONG))
    alone = generator.open().submit(asked(LONG))
    for _ in range(3):
        engine.step()
    assert generator.generate([Request((9, 10), 2)], Sampling(1.0, 30), KEY) == expected
    finish(engine)
    other = generator.open()
    (alone,) = other.submit(asked(LONG))
    finish(other)
    assert sampled([row]) == sampled([alone])


def test_closing_releases_all_rows(generator: Generator) -> None:
    engine = generator.open()
    rows = engine.submit(asked(LONG, n=6))
    engine.step()
    engine.step()
    engine.park(rows[0])
    engine.close()
    assert {row.state for row in rows} <= {"released", "done"}
    assert engine._run.seats._opened is None
    while engine.busy:
        engine.step()


@pytest.mark.parametrize("way", ["joined layers", "batch caches"])
def test_a_turn_may_have_rules_of_its_own(way: str) -> None:
    """Another number of tokens, and another token that ends it: drawn as if the row had always had them."""
    generator = generator_of(way, 2)
    engine = generator.open()
    first = Sampling(1.0, 60, max_turn_tokens=5)
    (row,) = engine.submit(asked(LONG, sampling=first))
    finish(engine)
    engine.extend(row, [70, 71], Sampling(1.0, 60, max_turn_tokens=9))
    finish(engine)
    assert row.finish_reason in ("stop", "max_turn_tokens")
    other = fresh(generator, row, LONG)
    assert row.turn == other.token_ids
    assert row.logprobs[-len(row.turn) :] == pytest.approx(other.logprobs, abs=2e-5)
    token = row.turn[0]
    engine.extend(row, [70], Sampling(1.0, 60, stop_ids=(*range(8, 128),)))
    finish(engine)
    assert len(row.turn) == 1
    assert row.finish_reason == "stop"
    assert token not in STOPS
    with pytest.raises(ValueError, match="max_tokens limits all turns of a row together"):
        engine.extend(row, [70], Sampling(1.0, 61))
    with pytest.raises(ValueError, match="all turns of a row must reshape the distribution"):
        engine.extend(row, [70], Sampling(1.0, 60, top_k=3))
    engine.close()


def test_rows_may_be_counted_from_another_number() -> None:
    generator = generator_of("joined layers", 4)
    engine = generator.open()
    rows = engine.submit(asked(LONG, n=3))
    again = engine.submit(asked(LONG, n=2, first=1))
    finish(engine)
    assert sampled(again) == sampled(rows[1:])
    engine.close()
