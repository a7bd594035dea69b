"""Continuous batching in both orders: steps launched one over another, as kernels allow, and one after another."""

import random

import mlx.core as mx
import pytest

from grpo.backend.random import derive_key
from grpo.generation import buffers, shared, slots
from grpo.generation.attention import StockAttention
from grpo.generation.batching import Run
from grpo.generation.buffers import cache_shapes
from grpo.generation.decoders import ModelDecoder
from grpo.generation.decoding import SharedPrefix
from grpo.generation.generator import Generator, Request
from grpo.generation.rows import Submission
from grpo.generation.sampling import Sampling

KEY = derive_key(0, "test")


class Overlapping(StockAttention):
    """Stock operations in the order that kernels run in: right, though MLX copies the buffers then."""

    overlaps = True


class NoText:
    eos_token_ids = frozenset({0, 1, 2, 3, 4, 5, 6, 7})

    def decode(self, _ids, **_kwargs) -> str:
        return ""


@pytest.fixture
def generator(zoo, monkeypatch):
    """Makes a generator with so many slots, whose steps overlap or not, on few columns and small chunks."""
    monkeypatch.setattr(slots, "width_step", lambda: 4)
    monkeypatch.setattr(buffers, "PREFILL_CHUNK", 5)
    monkeypatch.setattr(shared, "PREFILL_TOKENS", 40)
    model = zoo("untied", num_hidden_layers=2)

    def make(count: int, overlaps: bool) -> Generator:
        made = Generator(model, NoText(), count)
        if overlaps:
            made.decoding = SharedPrefix(model, ModelDecoder(model), Overlapping(), cache_shapes(model), 128, "")
        return made

    return make


def loads(seed: int) -> tuple[list[Request], Sampling]:
    draw = random.Random(seed)
    requests = [
        Request([draw.randrange(8, 128) for _ in range(draw.choice([1, 1, 2, 5, 9, 17]))], draw.randint(1, 5))
        for _ in range(draw.randint(1, 12))
    ]
    most = draw.choice([1, 2, 5, 11])
    return requests, Sampling(
        temperature=draw.choice([1.0, 0.0, 5.0]),
        max_tokens=most,
        top_k=draw.choice([0, 40]),
        repetition_penalty=draw.choice([1.0, 1.3]),
        min_tokens=draw.choice([0, min(2, most - 1)]),
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_order_of_steps_changes_nothing(generator, seed: int) -> None:
    requests, sampling = loads(seed)
    few = random.Random(seed).randint(1, 6)
    ways = [(99, False), (few, False), (99, True), (few, True)]
    found = [generator(*way).generate(requests, sampling, KEY) for way in ways]
    flat = [[completion for group in groups for completion in group] for groups in found]
    for others in flat[1:]:
        for here, there in zip(flat[0], others, strict=True):
            assert here.token_ids == there.token_ids
            assert here.behaviour == pytest.approx(there.behaviour, abs=1e-4)


def test_overlapping_steps_are_launched_before_the_last_is_read(generator, monkeypatch) -> None:
    """Of five steps without a prompt to prefill between them, all but the last are read one behind."""
    order: list[str] = []
    read = Run._read
    launch = mx.async_eval
    monkeypatch.setattr(Run, "_read", lambda self, step: (order.append("read"), read(self, step))[1])
    monkeypatch.setattr(mx, "async_eval", lambda arrays: (order.append("launch"), launch(arrays))[1])
    generator(2, True).generate([Request([9, 9], 2)], Sampling(0.0, 5), KEY)
    steps = order.count("launch")
    assert order == ["launch", *["launch", "read"] * (steps - 1), "read"]


@pytest.mark.parametrize("change", ["insert", "keep"])
def test_buffers_do_not_change_under_a_step_that_reads_them(generator, monkeypatch, change: str) -> None:
    """Whenever prompts' keys and values go in, or slots are dropped, every step that was launched has been read."""
    flying, changes = 0, 0
    read, launch, original = Run._read, mx.async_eval, getattr(buffers.Layer, change)

    def count(by: int) -> None:
        nonlocal flying
        flying += by

    def checked(self, *arguments) -> None:
        nonlocal changes
        assert flying == 0
        changes += 1
        original(self, *arguments)

    monkeypatch.setattr(Run, "_read", lambda self, step: (count(-1), read(self, step))[1])
    monkeypatch.setattr(mx, "async_eval", lambda arrays: (count(1), launch(arrays))[1])
    monkeypatch.setattr(buffers.Layer, change, checked)
    generator(3, True).generate([Request([9 + i] * (2 + i), 2) for i in range(8)], Sampling(5.0, 6), KEY)
    assert flying == 0
    assert changes


@pytest.mark.parametrize("change", ["take", "put", "grow"])
def test_nor_do_they_when_rows_come_back_and_buffers_grow(generator, monkeypatch, change: str) -> None:
    flying, changes = 0, 0
    read, launch, original = Run._read, mx.async_eval, getattr(buffers.Layer, change)

    def count(by: int) -> None:
        nonlocal flying
        flying += by

    def checked(self, *arguments):
        nonlocal changes
        assert flying == 0
        changes += 1
        return original(self, *arguments)

    monkeypatch.setattr(Run, "_read", lambda self, step: (count(-1), read(self, step))[1])
    monkeypatch.setattr(mx, "async_eval", lambda arrays: (count(1), launch(arrays))[1])
    monkeypatch.setattr(buffers.Layer, change, checked)
    engine = generator(3, True).open()
    for longest in (6, 12, 24):
        engine.submit(Submission([9] * longest, Sampling(5.0, longest), longest, n=4, keep=True))
        for _ in range(8):
            for row in engine.step().ended:
                if row.room >= 2:
                    engine.extend(row, [10, 11])
    engine.close()
    assert changes
