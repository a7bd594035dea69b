"""On a CPU small models decode with copies of their matrices that have the adapters in them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from generation.test_joined_adapters import NoText, worst_gap
from generation.test_wide_steps import KINDS, both
from generation.ways import asked, exact_buffers, finish, held, model_of, sampled
from mlx.utils import tree_flatten

from grpo.backend.random import derive_key
from grpo.config import AdapterConfig
from grpo.generation import blocks
from grpo.generation.generator import Generator, Request
from grpo.generation.joined import Products
from grpo.generation.sampling import Sampling
from grpo.model.adapters import Adapters

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU applies adapters in kernels of its own")

KEY = derive_key(0, "test")
BOUND = 1e-5
"""Nats between decoding and teacher forcing, in float32."""
MODELS = {"tied": ("qwen3", {"tie_word_embeddings": True}), "untied": ("qwen3", {}), "biases": ("qwen2", {})}


def adapted(name: str = "untied", targets: tuple[str, ...] | str = "all-linear", size: float = 0.1) -> nn.Module:
    """A small model under an adapter whose B is not zero."""
    architecture, changes = MODELS[name]
    model = model_of(architecture, **changes)
    adapters = Adapters(model, AdapterConfig(rank=4, scale=2.0, targets=targets), mx.random.key(0))
    adapters.load_state(moved(adapters, 1, size))
    mx.eval(model.parameters())
    return model


def moved(adapters: Adapters, seed: int, size: float = 0.1) -> dict[str, mx.array]:
    state = adapters.state()
    keys = mx.random.split(mx.random.key(seed), len(state))
    drawn = zip(state.items(), keys, strict=True)
    return {path: size * mx.random.normal(array.shape, key=key) for (path, array), key in drawn}


def merges(generator: Generator) -> int:
    """Bytes of the copies that a way of decoding makes."""
    assert generator.decoding.description.startswith("joined layers")
    return generator.decoding.decoder.copied  # type: ignore[attr-defined, no-any-return]


def unmerged(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Generator:
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "MOST_MERGED", -1)
        return Generator(model, NoText(), 4)


@pytest.mark.each_value
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "up_proj"), ("down_proj",)])
def test_what_is_decoded_is_what_the_update_computes(name: str, targets: tuple[str, ...] | str, monkeypatch) -> None:
    model = adapted(name, targets)
    generator = Generator(model, NoText(), 4)
    assert merges(generator)
    assert worst_gap(model, generator) < BOUND
    assert not merges(unmerged(model, monkeypatch))


def test_adapters_of_several_ranks_and_scales() -> None:
    model = adapted()
    for number, layer in enumerate(model.layers):
        q, v = layer.self_attn.q_proj, layer.self_attn.v_proj
        q.scale = 3.0 + number
        v.lora_a, v.lora_b = v.lora_a[:, :3], 0.3 * v.lora_b[:3]
    assert worst_gap(model, Generator(model, NoText(), 4)) < BOUND


def test_an_adapter_of_zeros_is_the_base_to_the_bit() -> None:
    plain, zeros = model_of("qwen3"), model_of("qwen3")
    Adapters(zeros, AdapterConfig(rank=4), mx.random.key(0))
    rows = []
    for model in (plain, zeros):
        generator = Generator(model, NoText(), 4)
        generator.decoding.refresh()
        layers = generator.decoding.decoder.blocks.products
        assert all("merged" in product.lora for product in layers) == (model is zeros)
        x = mx.random.normal((5, 32), key=mx.random.key(3))
        rows.append([product(x) for product in layers if product.joined["weight"].shape[1] == 32])
    assert all(mx.array_equal(a, b) for a, b in zip(*rows, strict=True))


def test_each_state_of_the_adapter_is_followed() -> None:
    """Switching back and forth between two states and the base, and an update in between."""
    model = model_of("qwen3")
    adapters = Adapters(model, AdapterConfig(rank=4, scale=2.0), mx.random.key(0))
    adapters.load_state(moved(adapters, 1))
    adapters.add("other", moved(adapters, 2))
    adapters.add("base", {path: mx.zeros_like(array) for path, array in adapters.state().items()})
    generator = Generator(model, NoText(), 4)
    for step in range(2):
        assert worst_gap(model, generator) < BOUND
        for name in ("other", "base"):
            with adapters.use(name):
                assert worst_gap(model, generator) < BOUND
        adapters.load_state(moved(adapters, 3 + step))


@pytest.mark.parametrize("change", ["adapter", "base"])
def test_what_changes_while_a_row_is_parked_is_taken_over_by_the_next(change: str) -> None:
    """The copies are still there then, made of what the model held before."""
    model = model_of("qwen3")
    adapters = Adapters(model, AdapterConfig(rank=4, scale=2.0), mx.random.key(0))
    adapters.load_state(moved(adapters, 1))
    generator = Generator(model, NoText(), 4)
    engine, fresh = generator.open(), generator.open()
    (row,) = engine.submit(asked([9, 10, 11]))
    engine.step()
    engine.park(row)
    if change == "adapter":
        adapters.load_state(moved(adapters, 2))
    else:
        for layer in model.layers:
            layer.mlp.up_proj.linear.weight = layer.mlp.up_proj.linear.weight * 1.5
    found = []
    for other in (engine, fresh):
        found += other.submit(asked([9, 10, 12], sampling=Sampling(1.0, 8), keep=False, logprobs=True))
        while found[-1].finish_reason is None:
            other.step()
        engine.release(row)  # with the last row the copies go, so that the fresh engine makes its own
    assert not engine.busy
    assert (found[0].token_ids, found[0].logprobs) == (found[1].token_ids, found[1].logprobs)


@exact_buffers
def test_the_base_stays_as_it_is_and_the_copies_go_with_the_last_row() -> None:
    model = adapted("tied")
    generator = Generator(model, NoText(), 4)
    weights = {path: array + 0 for path, array in tree_flatten(model.parameters())}
    mx.eval(weights)
    generator.generate([Request([5, 6, 7], 2)], Sampling(max_tokens=4), KEY)
    before = held()
    engine = generator.open()
    engine.submit(asked([5, 6, 7], keep=False))
    engine.step()
    assert held() - before >= merges(generator) > 0
    finish(engine)
    assert held() == before
    now = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(now[path], array) for path, array in weights.items())


@pytest.mark.parametrize("trains", [False, True])
def test_an_engine_that_ends_takes_nothing_from_another(trains: bool) -> None:
    """Neither copies with adapters nor, where whole weights train, the joined matrices."""
    model = adapted()
    if trains:
        model = model_of("qwen3")
        model.unfreeze()
    generator = Generator(model, NoText(), 4)

    def row(engine):
        return engine.submit(asked([9, 10, 11], sampling=Sampling(1.0, 20), keep=False, logprobs=True))

    alone, first, second = generator.open(), generator.open(), generator.open()
    expected = row(alone)
    finish(alone)
    found = row(first)
    first.step()
    row(second)
    finish(second)
    finish(first)
    assert sampled(found) == sampled(expected)
    assert found[0].logprobs == expected[0].logprobs
    assert not any(product.lora for product in generator.decoding.decoder.blocks.products)


def test_an_engine_that_was_dropped_holds_no_copies() -> None:
    generator = Generator(adapted(), NoText(), 4)
    dropped = generator.open()
    dropped.submit(asked([9, 10, 11]))
    dropped.step()
    del dropped
    generator.generate([Request([5, 6, 7], 1)], Sampling(max_tokens=4), KEY)
    assert not any(product.lora for product in generator.decoding.decoder.blocks.products)


def test_lanes_share_the_copies(monkeypatch) -> None:
    """They are made once for both, and both draw what one lane draws."""
    generator = Generator(adapted(), NoText(), 8)
    made, take = [], Products._take_adapters
    monkeypatch.setattr(Products, "_take_adapters", lambda self, dtype: made.append(self) or take(self, dtype))
    requests, found = [Request([5, 6, 7 + i], 4) for i in range(2)], []
    generator.decoding.forget()  # it was tried
    for lanes in (1, 2):
        made.clear()
        generator.lanes = lanes
        found.append(generator.generate(requests, Sampling(max_tokens=8), KEY))
        assert len(made) == len(generator.decoding.decoder.blocks.products)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_change_nothing(kind: str) -> None:
    generator = Generator(adapted(), NoText(), 6)
    prompts = [(9, 10, 11), (12,), tuple(range(20, 45))]
    both(generator, [asked(prompt, i, n=2, keep=False) for i, prompt in enumerate(prompts)], kind, [4, 8, 1, 2])


def test_only_plain_float32_weights_on_a_cpu_are_copied_and_no_more_than_the_bound(zoo, monkeypatch) -> None:
    model = adapted()
    copies = merges(Generator(model, NoText(), 4))
    assert copies == sum(
        array.nbytes
        for layer in model.layers
        for path, array in tree_flatten(layer.parameters())
        if path.endswith("linear.weight")
    )
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "MOST_MERGED", copies)
        assert merges(Generator(model, NoText(), 4))
        patch.setattr(blocks, "MOST_MERGED", copies - 1)
        assert not merges(Generator(model, NoText(), 4))
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "on_gpu", lambda: True)
        assert not merges(Generator(model, NoText(), 4))
    quantised = zoo("quantised")
    Adapters(quantised, AdapterConfig(rank=4), mx.random.key(0))
    half = model_of("qwen3")
    half.set_dtype(mx.bfloat16)
    Adapters(half, AdapterConfig(rank=4), mx.random.key(0))
    for other in (quantised, half, model_of("qwen3")):
        assert not merges(Generator(other, NoText(), 4))


def test_the_plan_counts_the_copies(monkeypatch) -> None:
    model = adapted()
    generator = Generator(model, NoText(), 4)
    with_copies, without = (g.decoding.memory(4, 2, 10, 10) for g in (generator, unmerged(model, monkeypatch)))
    assert with_copies - without == merges(generator) > 0
