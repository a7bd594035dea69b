"""What a compiled step is made with, and what it takes over at each call."""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import pytest
from generation.ways import qwen
from mlx.utils import tree_map

from grpo.generation.blocks import read
from grpo.generation.buffers import cache_shapes
from grpo.generation.decoders import BlockDecoder
from grpo.generation.slots import Size, Slots


class NoAttention:
    """Passes queries on, which tells as much of the weights around it."""

    overlaps = True

    def attend_joined(self, _layer, qkv: mx.array, _block, blocks, _view) -> mx.array:
        return qkv[:, : blocks.query_heads * blocks.width]


@pytest.fixture
def compiles(monkeypatch) -> Iterator[list[object]]:
    """Compiling is on; the functions that were compiled."""
    compiled, compile_ = [], mx.compile
    monkeypatch.setattr(mx, "compile", lambda function, **how: compiled.append(function) or compile_(function, **how))
    mx.enable_compile()
    yield compiled
    mx.disable_compile()


def after_an_update(model: nn.Module) -> None:
    """Every parameter is another array."""
    model.update(tree_map(lambda array: array * 1.25 + 0.01, model.parameters()))


def steps(model: nn.Module, decoder: BlockDecoder) -> tuple[mx.array, mx.array]:
    """The logits of a step, by the trace and without."""
    decoder.refresh()
    size = Size(4, 1, 1, 1)
    tokens, view = mx.array([[5], [6], [7], [9]]), Slots(size).view()
    layers = [shape.layer(size) for shape in cache_shapes(model)]
    traced = decoder.logits(tokens, layers, NoAttention(), view)
    return traced, decoder._logits(tokens, layers, NoAttention(), view)


@pytest.mark.slow  # compiling calls a C++ compiler
@pytest.mark.parametrize("train", [True, False])
def test_one_trace_serves_weights_that_train_and_another_is_made_for_weights_that_were_replaced(
    compiles, train: bool
) -> None:
    model = qwen()
    if train:
        model.unfreeze()
    decoder = BlockDecoder(read(model))
    for update in range(3):
        traced, plain = steps(model, decoder)
        assert mx.allclose(traced, plain, atol=1e-5)
        decoder.forget()
        assert len(compiles) == (1 if train else update + 1)
        after_an_update(model)


class AddsColumns(NoAttention):
    """Adds the mean of all columns to the queries, which tells how many there are and what they hold."""

    def attend_joined(self, layer, qkv: mx.array, _block, blocks, _view) -> mx.array:
        return qkv[:, : blocks.query_heads * blocks.width] + layer.keys.mean() - layer.values.mean()


@pytest.mark.slow  # compiling calls a C++ compiler
def test_a_trace_follows_buffers_that_grow(compiles) -> None:
    model = qwen()
    decoder = BlockDecoder(read(model))
    decoder.refresh()
    slots = Slots(Size(4, 1, 1, 8))
    layers = [shape.layer(slots.size) for shape in cache_shapes(model)]
    for number, layer in enumerate(layers):
        layer.keys, layer.values = layer.keys + 1 + number, layer.values - number
    tokens, found = mx.array([[5], [6], [7], [9]]), []
    for columns in (8, 16, 16, 24):
        size = Size(4, 1, 1, columns)
        slots.grow(size)
        for layer in layers:
            layer.grow(size)
        found.append(decoder.logits(tokens, layers, AddsColumns(), slots.view()))
        assert mx.allclose(found[-1], decoder._logits(tokens, layers, AddsColumns(), slots.view()), atol=1e-5)
    assert mx.array_equal(found[1], found[2])
    assert not mx.allclose(found[0], found[1], atol=1e-3)
    assert len(compiles) == 1
