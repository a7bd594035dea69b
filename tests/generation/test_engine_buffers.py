"""What the engine holds: buffers that follow the load, prompts in their places, and what rows keep."""

import mlx.core as mx
import pytest
from ways import LONG, asked, exact_buffers, finish, fresh, generator_of, held, model_of, qwen, sampled

from grpo.backend import cuda
from grpo.generation import generator as generator_module
from grpo.generation import shared
from grpo.generation import slots as slots_module
from grpo.generation.batchcaches import BatchCaches
from grpo.generation.caches import empty, extended, extends_together
from grpo.generation.generator import Generator
from grpo.generation.rows import Line, SharedPrompt
from grpo.generation.sampling import Sampling
from grpo.generation.slots import Size, Slots


@pytest.fixture
def generator() -> Generator:
    return generator_of("joined layers", 4)


def test_a_group_s_prompt_is_prefilled_once_for_all_turns(generator: Generator, monkeypatch) -> None:
    seen: list = []
    prefill = shared.prefill
    monkeypatch.setattr(
        shared, "prefill", lambda model, ids, *to: (seen.extend(map(tuple, ids)), prefill(model, ids, *to))[1]
    )
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
    monkeypatch.setattr(
        shared, "prefill", lambda model, ids, *to: (seen.extend(map(tuple, ids)), prefill(model, ids, *to))[1]
    )

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
    assert size() == Size(2, 1, 1, 64)
    rows = engine.submit(asked(LONG, n=9, keep=False, sampling=Sampling(1.0, 20)))
    engine.step()
    assert size() == Size(8, 2, 24, 64)  # no more slots than there may be, nor more columns than are needed
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


@exact_buffers
@pytest.mark.parametrize("way", ["joined layers", "recurrent state"])
def test_what_a_row_keeps_is_its_own(way: str) -> None:
    """It does not hold on to the buffers of all rows."""
    generator = generator_of(way, 16)
    before = held()
    engine = generator.open()
    rows = engine.submit(asked(LONG, n=16))
    finish(engine)
    engine.step()
    row, *others = (row for row in rows if row.state == "waiting")
    engine._run.seats._session = None  # only what is kept is left
    for other in others:
        engine._run.seats.parking.drop(other)
    assert row.kept.nbytes <= held() - before < row.kept.nbytes + 20_000
    fed_last = way == "recurrent state"  # by the step that was under way; such caches cannot be cut
    assert row.kept.fed == len(row.token_ids) + fed_last


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
    monkeypatch.setattr(cuda, "available", lambda: False)  # `fresh` counts its draws on by stock operations' keys
    toy = make_policy()
    engine = toy.generator.open()
    (row,) = engine.submit(asked((5, 6, 7), sampling=Sampling(1.0, 60, stop_ids=tuple(range(0, 300, 2)))))
    finish(engine)
    engine.step()
    assert row.kept is not None
    other = BatchCaches(toy.policy.model, toy.generator.decoding.vocabulary)
    monkeypatch.setattr(generator_module, "find_decoding", lambda *_: other)
    layer = toy.policy.model.layers[0].self_attn
    layer.o_proj = type(layer.o_proj).from_base(layer.o_proj.linear)
    engine.extend(row, [9, 10])
    finish(engine)
    assert toy.generator.decoding is other
    assert row.finish_reason is not None
    assert fresh(toy.generator, row, (5, 6, 7)).token_ids == row.token_ids[row.injected[0].stop :]


def test_only_the_columns_up_to_the_longest_row_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "width_step", lambda: 64)
    slots = Slots(Size(3, 1, 4, 1024))
    slots.step = 1000
    slots.admit([0, 1], [0, 0], [4, 4], [100, 5])
    assert (slots.own(0), slots.own(1)) == (100, 5)
    assert slots.view().width == 128
    assert slots.view(8).columns.tolist()[1] == list(range(5, 13))
    slots.vacate(0)
    assert slots.view().width == 64
    slots.vacate(1)
    slots.step = 5000
    assert slots.view().columns.max().item() == 1023  # a slot without a row stays in its buffer


def test_what_a_wide_step_kept_is_counted_for_each_slot() -> None:
    slots = Slots(Size(3, 1, 4, 64))
    slots.admit([0, 1, 2], [0, 0, 0], [4, 4, 4], [0, 3, 9])
    assert slots.view(4).level is None
    slots.accept([4, 1, 0])
    assert slots.decoded().tolist() == slots.view().decoded.tolist() == [4, 4, 9]
    slots.advance()
    assert [slots.own(slot) for slot in range(3)] == [5, 5, 10]
    slots.vacate(2)
    assert slots.view().level == 5  # all rows are at the same column


def test_a_line_knows_what_has_not_been_fed() -> None:
    line = Line(SharedPrompt((5, 6)))
    assert (line.last, line.pending) == (6, [])
    line.token_ids += [7, 8]
    assert (line.last, line.pending) == (8, [6, 7])
