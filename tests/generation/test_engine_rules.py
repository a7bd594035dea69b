"""What rows of the engine may and may not do, what its events say, and what it holds meanwhile."""

import mlx.core as mx
import pytest
from ways import LONG, STOPS, asked, finish, fresh, generator_of, model_of, qwen, sampled

from grpo.backend.random import derive_key
from grpo.generation import generator as generator_module
from grpo.generation import shared
from grpo.generation.batchcaches import BatchCaches
from grpo.generation.caches import empty, extended, extends_together
from grpo.generation.generator import Generator, Request
from grpo.generation.rows import Line, Prompt
from grpo.generation.sampling import Sampling
from grpo.generation.slots import Size, Slots

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


def test_a_penalty_sees_all_that_came_before(generator: Generator) -> None:
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
    assert row.stopping.text(row.token_ids) == " ".join(map(str, turn[:-1] if turn[-1] in STOPS else turn))
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
    with pytest.raises(ValueError, match=rf"has {n} tokens .* may have 60, .*: {60 - n} more do not fit, {59 - n} wou"):
        engine.extend(row, [50] * (60 - n))
    engine.extend(row, [50] * row.room)
    finish(engine)
    assert len(row.token_ids) == 60
    assert row.finish_reason in ("length", "stop")
    assert row.state == "done"
    with pytest.raises(ValueError, match="has ended with all its 60 tokens, so it cannot be extended"):
        engine.extend(row, [50])
    assert not engine.busy


def test_wrong_use_is_told_in_a_sentence(generator: Generator) -> None:
    engine = generator.open()
    with pytest.raises(ValueError, match="a prompt needs at least one token"):
        engine.submit(asked(()))
    with pytest.raises(ValueError, match="max_tokens is 0: a row needs room"):
        engine.submit(asked((5,), sampling=Sampling(1.0, 0)))
    (row,) = engine.submit(asked((5, 6)))
    with pytest.raises(ValueError, match=r"this row still decodes, so it cannot be extended: wait .* or park it"):
        engine.extend(row, [9])  # it has not begun yet
    engine.step()
    with pytest.raises(ValueError, match="this row still decodes"):
        engine.extend(row, [9])
    finish(engine)
    with pytest.raises(ValueError, match="needs at least one token more"):
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


def test_a_group_s_prompt_is_prefilled_once_for_all_turns(generator: Generator, monkeypatch) -> None:
    seen: list = []
    prefill = shared.prefill
    monkeypatch.setattr(shared, "prefill", lambda model, ids: (seen.extend(map(tuple, ids)), prefill(model, ids))[1])
    engine = generator.open()
    rows = [row for i in range(3) for row in engine.submit(asked((*LONG, 50 + i), i, n=3))]
    for _ in range(3):
        finish(engine)
        for row in rows:
            if row.room >= 3 and row.state == "waiting":
                engine.extend(row, [80, 81, 82])
    finish(engine)
    assert sorted(seen) == [(*LONG, 50 + i) for i in range(3)]


def test_a_prompt_whose_place_was_given_away_is_prefilled_again(generator: Generator, monkeypatch) -> None:
    """One slot has one prefix place, for which two prompts take turns."""
    seen: list = []
    prefill = shared.prefill
    monkeypatch.setattr(shared, "prefill", lambda model, ids: (seen.extend(map(tuple, ids)), prefill(model, ids))[1])

    def conversation(slots: int):
        generator.slots = slots
        engine = generator.open()
        rows = [row for i in range(2) for row in engine.submit(asked((*LONG, 50 + i), i))]
        for _ in range(2):
            finish(engine)
            for row in rows:
                if row.room >= 3 and row.state == "waiting":
                    engine.extend(row, [80, 81, 82])
        finish(engine)
        return sampled(rows)

    expected = conversation(2)
    assert len(seen) == 2
    assert conversation(1) == expected
    assert len(seen) > 4


def test_buffers_follow_the_load(generator: Generator) -> None:
    def size() -> Size:
        return engine._run.seats._session._slots.size

    generator.stop_ids, generator.slots = frozenset(), 8
    engine = generator.open()
    engine.submit(asked((5, 6), n=2, keep=False, sampling=Sampling(1.0, 60)))
    engine.step()
    assert size() == Size(2, 1, 1, 60)
    rows = engine.submit(asked(LONG, n=9, keep=False, sampling=Sampling(1.0, 20)))
    engine.step()
    assert size() == Size(8, 2, 24, 60)  # no more slots than there may be, nor longer rings than are needed
    while any(row.finish_reason is None for row in rows):
        engine.step()
    engine.step()
    assert size().slots == 2
    finish(engine)
    assert engine._run.seats._opened is None


def test_slots_stay_for_rows_that_may_come_back(generator: Generator) -> None:
    generator.stop_ids = frozenset()
    engine = generator.open()
    rows = engine.submit(asked((5, 6), n=4))
    engine.step()
    for row in rows[:3]:
        engine.park(row)
    for _ in range(6):  # the first steps bring what was read while rows were parked
        engine.step()
    assert engine._run.seats.count == 4
    for row in rows[:3]:
        engine.release(row)
    engine.step()
    engine.step()
    assert engine._run.seats.count == 1


@pytest.mark.parametrize("way", ["joined layers", "recurrent state"])
def test_what_a_row_keeps_is_its_own(way: str) -> None:
    """It does not hold on to the buffers of all rows."""
    generator = generator_of(way, 16)
    mx.clear_cache()
    before = mx.get_active_memory()
    engine = generator.open()
    rows = engine.submit(asked(LONG, n=16))
    finish(engine)
    engine.step()
    row, *others = (row for row in rows if row.state == "waiting")
    engine._run.seats._session = None  # only what is kept is left
    for other in others:
        engine._run.seats.parking.drop(other)
    mx.clear_cache()
    assert row.kept.nbytes <= mx.get_active_memory() - before < row.kept.nbytes + 20_000
    assert row.kept.fed == len(row.token_ids) + 1  # the step that was under way has fed its last token


def test_rows_that_go_on_together_are_what_they_are_alone() -> None:
    model = qwen()
    prompts, more = [[9, 10, 11], [12], list(LONG)], [[13] * 20, [14, 15], []]
    alone, together = (
        extended(model, extended(model, [empty(model) for _ in prompts], prompts, False), more, way)
        for way in (False, True)
    )
    for one, other in zip(alone, together, strict=True):
        for cache, same in zip(one, other, strict=True):
            assert cache.offset == same.offset
            assert mx.allclose(cache.keys_and_values()[0], same.keys_and_values()[0], atol=1e-5)
            assert mx.allclose(cache.keys_and_values()[1], same.keys_and_values()[1], atol=1e-5)


def test_a_model_that_takes_no_masks_of_several_rows_is_found_out() -> None:
    assert extends_together(qwen(), 1e-3)
    assert not extends_together(model_of("gemma2", attn_logit_softcapping=50.0, query_pre_attn_scalar=16), 1e-3)


def test_an_update_between_turns_is_followed(make_policy) -> None:
    """By new tokens; what was kept is of the former weights."""
    toy = make_policy()
    engine = toy.generator.open()
    (row,) = engine.submit(
        asked((5, 6, 7), sampling=Sampling(0.0, 60, max_repeats=2, stop_ids=tuple(range(0, 300, 2))))
    )
    finish(engine)
    assert row.state == "waiting"
    toy.policy.adapters.load_state({path: array * 3 for path, array in toy.policy.adapters.state().items()})
    engine._run.seats.parking.drop(row)  # so that nothing of the former weights is left
    engine._run.seats._session.forget(row.prompt)
    begin = len(row.token_ids) + 2
    engine.extend(row, [9, 10])
    finish(engine)
    tokens = mx.array([[5, 6, 7, *row.token_ids]])
    logits = toy.policy.model(tokens[:, :-1])[0].astype(mx.float32)
    forced = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = mx.take_along_axis(forced, tokens[0, 1:, None], axis=-1)[2 + begin :, 0].tolist()
    assert row.logprobs[begin:] == pytest.approx(expected, abs=1e-4)


def test_a_model_of_other_modules_is_decoded_anew(make_policy, monkeypatch) -> None:
    """What rows have kept is of no use to another way of decoding: it is computed again."""
    toy = make_policy()
    engine = toy.generator.open()
    (row,) = engine.submit(asked((5, 6, 7), sampling=Sampling(1.0, 60, stop_ids=tuple(range(0, 300, 2)))))
    finish(engine)
    engine.step()
    assert row.kept is not None
    other = BatchCaches(toy.policy.model, toy.generator.decoding.vocabulary)
    monkeypatch.setattr(generator_module, "find_decoding", lambda _: other)
    layer = toy.policy.model.layers[0].self_attn
    layer.o_proj = type(layer.o_proj).from_base(layer.o_proj.linear)
    engine.extend(row, [9, 10])
    finish(engine)
    assert toy.generator.decoding is other
    assert row.finish_reason is not None
    assert fresh(toy.generator, row, (5, 6, 7)).token_ids == row.token_ids[row.injected[0].stop :]


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


def test_room_is_made_without_reading_more_columns_than_before() -> None:
    slots = Slots(Size(2, 1, 4, 1024))
    slots.step, slots.starts = 10, [0, 5]
    order = slots.make_room(100, whole=False)
    assert slots.step == 128  # the next multiple of what stock operations read
    assert slots.starts == [118, 123]
    assert [order[column] for column in range(118, 128)] == list(range(10))
    slots.admit([1], [0], [4], [100])
    assert slots.own(1) == [slice(28, 128)]
    assert slots.view().width == 192
    assert slots.make_room(128, whole=False) is None


def test_a_full_ring_is_turned_by_whole_rounds() -> None:
    slots = Slots(Size(2, 1, 4, 96))
    slots.step, slots.starts = 10, [0, 5]
    assert slots.make_room(80, whole=False) is None
    assert (slots.step, slots.starts) == (106, [96, 101])
    slots.admit([1], [0], [4], [80])
    assert slots.own(1) == [slice(26, 96), slice(0, 10)]


def test_a_line_knows_what_has_not_been_fed() -> None:
    line = Line(Prompt((5, 6)))
    assert (line.last, line.pending) == (6, [])
    line.token_ids += [7, 8]
    assert (line.last, line.pending) == (8, [6, 7])
