"""Buffers grow with the longest row: the same tokens and logprobs to the bit, in the memory that rows take."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import pytest
from test_wide_steps import SHARED, Drafter
from ways import LONG, Overlapping, asked, exact_buffers, finish, generator_of, model_of

from grpo.generation import buffers, growth, seats, slots
from grpo.generation.batching import Run
from grpo.generation.buffers import cache_shapes
from grpo.generation.decoders import ModelDecoder
from grpo.generation.decoding import SharedPrefix
from grpo.generation.engine import Engine
from grpo.generation.generator import Generator
from grpo.generation.growth import columns_for
from grpo.generation.rows import Line, Row, SharedPrompt
from grpo.generation.sampling import Sampling
from grpo.generation.slots import Size


@pytest.fixture
def small_steps(monkeypatch) -> None:
    monkeypatch.setattr(slots, "width_step", lambda: 8)
    monkeypatch.setattr(growth, "STEP", 8)
    monkeypatch.setattr(growth, "GPU_STEP", 8)


@pytest.fixture
def grown(monkeypatch) -> list[Size]:
    """The sizes that buffers take."""
    sizes: list[Size] = []
    fit = buffers.Layer.grow
    monkeypatch.setattr(buffers.Layer, "grow", lambda layer, size: (sizes.append(size), fit(layer, size))[1])
    return sizes


def session_of(engine: Engine):
    return engine._run.seats._session


@pytest.mark.parametrize(
    ("needed", "longest", "columns"),
    [(1, 1024, 64), (64, 1024, 128), (52, 1024, 128), (51, 1024, 64), (513, 4096, 704), (513, 600, 600), (1, 21, 24)],
)
def test_columns_by_hand(monkeypatch, needed: int, longest: int, columns: int) -> None:
    monkeypatch.setattr(growth, "GPU_STEP", 64)
    assert columns_for(needed, longest) == columns


def test_long_rows_grow_a_few_times() -> None:
    columns = times = 0
    while columns < 32_768:
        columns, times = columns_for(columns + 1, 32_768), times + 1
    assert times < 30


def conversations(generator: Generator) -> list[Row]:
    """Rows of all lengths that enter, end, wait, come back, are parked and are released at many steps."""
    engine = generator.open()
    rows = [row for i in range(3) for row in engine.submit(asked((*LONG, 50 + i), i, n=2, sampling=Sampling(1.0, 90)))]
    rows += engine.submit(asked((9,), 9, n=2, keep=False, sampling=Sampling(1.0, 30)))
    for turn in range(6):
        for _ in range(5):
            engine.step()
        if turn == 2:
            engine.park(rows[0])
            rows += engine.submit(asked(LONG, 11, n=2, keep=False, sampling=Sampling(1.0, 120)))
        if turn == 4:
            engine.release(rows[1])
            if rows[0].state == "parked":
                engine.extend(rows[0], [])
    for _ in range(3):
        finish(engine)
        for row in rows:
            if row.state == "waiting" and row.room > 4:
                engine.extend(row, [80, 81, 82])
    finish(engine)
    return rows


def same(rows: Sequence[Row], others: Sequence[Row]) -> None:
    for one, other in zip(rows, others, strict=True):
        if one.state != "released":
            assert one.token_ids == other.token_ids
            assert one.logprobs == other.logprobs


@pytest.mark.quick_cases("joined layers-2", "overlapping steps-5")
@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(
    ("way", "slots_"), [("joined layers", 2), ("joined layers", 16), *((way, 5) for way in SHARED)]
)
def test_when_buffers_grow_changes_no_bit(way: str, slots_: int, monkeypatch, grown: list[Size]) -> None:
    generator = generator_of(way, slots_)
    found = conversations(generator)
    assert len({size.columns for size in grown}) >= 3
    monkeypatch.setattr(seats, "columns_for", lambda _, longest: -(-longest // 8) * 8)
    grown.clear()
    fixed = conversations(generator)
    assert len({size.columns for size in grown}) <= 2  # by a longer limit alone
    same(found, fixed)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("kind", ["right", "some", "wrong"])
def test_wide_steps_have_room(kind: str, monkeypatch, grown: list[Size]) -> None:
    generator = generator_of("joined layers", 4)

    def rows() -> list[Row]:
        engine = generator.open()
        rows = engine.submit(asked(LONG, n=6, keep=False, sampling=Sampling(1.0, 75)))
        finish(engine)
        return list(rows)

    plain = rows()
    drafter = Drafter(kind, [4, 8, 1], {str(row.key.tolist()): list(row.token_ids) for row in plain})
    monkeypatch.setattr(generator, "speculation", drafter)
    same(plain, rows())
    assert len({size.columns for size in grown}) >= 3


@pytest.mark.usefixtures("small_steps")
def test_buffers_never_grow_under_a_step_that_reads_them(monkeypatch, grown: list[Size]) -> None:
    flying = 0
    read, launch, fit = Run._read, mx.async_eval, buffers.Layer.grow

    def count(by: int) -> None:
        nonlocal flying
        flying += by

    def checked(layer: buffers.Layer, size: Size) -> None:
        assert flying == 0
        fit(layer, size)

    monkeypatch.setattr(Run, "_read", lambda self, step: (count(-1), read(self, step))[1])
    monkeypatch.setattr(mx, "async_eval", lambda arrays: (count(1), launch(arrays))[1])
    monkeypatch.setattr(buffers.Layer, "grow", checked)
    engine = generator_of("overlapping steps", 4).open()
    engine.submit(asked(LONG, n=4, keep=False, sampling=Sampling(1.0, 60, min_tokens=50)))
    finish(engine)
    assert len({size.columns for size in grown}) >= 4


@pytest.mark.usefixtures("small_steps")
def test_no_columns_are_made_for_slots_that_stay_free() -> None:
    generator = generator_of("joined layers", 8)
    generator.stop_ids = frozenset()
    engine = generator.open()
    short = engine.submit(asked((5, 6), n=2, keep=False, sampling=Sampling(1.0, 4)))
    engine.submit(asked((5, 6), n=5, keep=False, sampling=Sampling(1.0, 60)))
    for _ in range(6):
        engine.step()
    assert all(row.state == "done" for row in short)
    assert session_of(engine)._slots.size == Size(7, 2, 1, 8)  # less than half of the slots are free
    for _ in range(2):
        engine.step()
    assert session_of(engine)._slots.size == Size(5, 1, 1, 16)
    engine.close()


@pytest.mark.usefixtures("small_steps")
def test_slots_that_others_will_enter_stay() -> None:
    generator = generator_of("joined layers", 3)
    generator.stop_ids = frozenset()
    engine = generator.open()
    (away,) = engine.submit(asked((5, 6), n=1, sampling=Sampling(1.0, 60)))
    engine.submit(asked((5, 6), n=2, sampling=Sampling(1.0, 60)))
    engine.step()
    engine.park(away)
    for _ in range(30):
        engine.step()
    size = session_of(engine)._slots.size
    assert size.slots == 3
    assert size.columns >= 30
    engine.close()


@exact_buffers
def test_growing_holds_one_array_twice() -> None:
    model = model_of("qwen3", num_hidden_layers=6)
    session = SharedPrefix(model, ModelDecoder(model), Overlapping(), cache_shapes(model), 128, "").open(
        Size(16, 2, 64, 512)
    )
    prompt = SharedPrompt((5, 6, 7))
    session.admit(range(16), [Line(prompt)] * 16)
    array = session._layers[0].keys.nbytes
    # The old array beside the new, and then 15 slots of 16 beside all of them, which have twice the columns.
    for change, most in ((lambda: session.fit(Size(16, 2, 64, 1024)), 1), (lambda: session.keep(range(15)), 2)):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        change()
        mx.eval([layer.arrays() for layer in session._layers])
        grown = max(0, mx.get_active_memory() - before)
        assert mx.get_peak_memory() - before < grown + 1.05 * most * array


@exact_buffers
def test_rows_that_end_early_take_no_more_than_they_have() -> None:
    """Of 16 rows one has 256 tokens and the others 16; the limit is 2,048."""
    model = model_of("qwen3", num_hidden_layers=4, head_dim=32)
    token = sum(shape.bytes_per_token for shape in cache_shapes(model))
    generator = Generator(model, generator_of("joined layers", 1).tokenizer, 16)
    generator.stop_ids = frozenset()

    def peak() -> int:
        engine = generator.open()
        engine.submit(asked((5, 6), n=15, keep=False, sampling=Sampling(1.0, 16)))
        (long,) = engine.submit(asked((5, 6), n=1, sampling=Sampling(1.0, 2048)))
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        while len(long.token_ids) < 256:
            engine.step()
        engine.close()
        return int(mx.get_peak_memory() - before)

    taken = peak()
    assert taken < 3 * token * 16 * 64
    assert taken < token * 16 * 2048 / 8


def test_the_plan_counts_the_array_that_is_held_twice() -> None:
    """Where that is more than what prompts and scores take."""
    model = model_of("qwen3")
    shapes = cache_shapes(model)
    decoding = SharedPrefix(model, ModelDecoder(model), Overlapping(), shapes, 128, "")
    token, array = sum(shape.bytes_per_token for shape in shapes), 2 * 16 * 4
    assert decoding.memory(16, 1, 2, 4096) == token * (16 * 4096 + 2) + 16 * 4096 * array
    assert decoding.memory(1, 1, 4096, 2) == token * (2 + 2 * 4096)
