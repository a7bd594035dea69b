"""Heads of 16-bit models with float32 logits: exact, the same for sampling and training, and never copied whole."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import make_model
from mlx.utils import tree_flatten
from pydantic import ValidationError

from grpo.config import AdapterConfig, ModelConfig
from grpo.errors import UserError
from grpo.generation.attention import StockAttention
from grpo.generation.batchcaches import BatchCaches
from grpo.generation.blocks import read
from grpo.generation.buffers import cache_shapes
from grpo.generation.choice import find_decoding
from grpo.generation.decoders import BlockDecoder, ModelDecoder
from grpo.generation.decoding import SharedPrefix
from grpo.generation.rows import Line, SharedPrompt
from grpo.generation.slots import Size
from grpo.model import load as loading
from grpo.model import widehead
from grpo.model.adapters import Adapters
from grpo.model.head import split_head
from grpo.model.load import cast, head_note, load
from grpo.model.logprobs import chunked_logprobs
from grpo.model.policy import Policy
from grpo.model.widehead import HELD, HELD_ON_CPU, WideEmbedding, bytes_at_work, float32_product, wide_head, widen_head

KINDS = ["tied", "untied", "llama", "quantised", "gemma2", "cohere", "granite"]
HALVES = [mx.bfloat16, mx.float16]


def half_model(kind: str, dtype: mx.Dtype, wide: bool, sharpness: float = 1.0, **changes) -> nn.Module:
    model = make_model(kind, **changes)
    if kind == "untied":
        model.lm_head.weight = model.lm_head.weight * sharpness
    cast(model, dtype)
    assert not wide or widen_head(model)
    return model


def halves(model: nn.Module) -> tuple[Callable[..., mx.array], Callable[[mx.array], mx.array]]:
    split = split_head(model)
    assert split is not None
    return split


def largest(array: mx.array) -> float:
    found: Any = mx.abs(array).max().item()
    return found


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several for the head of a toy: 10 rows of 64 numbers each, and a rest of 8."""
    monkeypatch.setattr(widehead, "CHUNK", 640)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_a_float32_head_on_the_same_hidden_states(kind: str, dtype: mx.Dtype) -> None:
    tokens = mx.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    narrow, wide = (half_model(kind, dtype, wide=on) for on in (False, True))
    hidden = halves(wide)[0](tokens, cache=None)
    assert hidden.dtype == dtype
    assert mx.array_equal(hidden, halves(narrow)[0](tokens, cache=None))
    reference = half_model(kind, dtype, wide=False)
    cast(reference, mx.float32)
    exact = halves(reference)[1](hidden.astype(mx.float32))
    logits = wide(tokens)
    assert logits.dtype == mx.float32
    assert narrow(tokens).dtype == dtype
    rounding = largest(narrow(tokens).astype(mx.float32) - exact)
    assert largest(logits - exact) < 2e-6 < rounding / 100


@pytest.mark.parametrize("dtype", HALVES)
def test_a_float32_logprob_of_a_large_logit_is_exact(dtype: mx.Dtype) -> None:
    """bfloat16 tells logits near 20 apart by an eighth: logprobs were off by 0.08 nats."""
    keys = mx.random.split(mx.random.key(0), 3)
    weight = mx.random.normal((2048, 128), key=keys[0]).astype(dtype)
    hidden = (mx.random.normal((1, 32, 128), key=keys[1]) * 0.5).astype(dtype)
    exact_logits = hidden.astype(mx.float32) @ weight.astype(mx.float32).T
    assert 15 < largest(exact_logits) < 40
    tokens = mx.random.categorical(exact_logits, key=keys[2])
    exact, _ = chunked_logprobs(hidden, tokens, lambda _: exact_logits[0], 1.0, 32)
    wide, _ = chunked_logprobs(hidden, tokens, lambda x: float32_product(x, weight), 1.0, 32)
    rounded, _ = chunked_logprobs(hidden, tokens, lambda x: x @ weight.T, 1.0, 32)
    assert largest(wide - exact) < 1e-5
    assert largest(rounded - exact) > (2e-2 if dtype == mx.bfloat16 else 2e-3)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_agree_with_a_float32_head_to_the_rounding_of_the_result(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype
) -> None:
    monkeypatch.setattr(widehead, "CHUNK", 100 * 64)  # six pieces
    keys = mx.random.split(mx.random.key(0), 3)
    weight = (mx.random.normal((512, 64), key=keys[0]) * 0.5).astype(dtype)
    hidden = mx.random.normal((2, 24, 64), key=keys[1]).astype(dtype)
    tokens = mx.random.randint(0, 512, (2, 24), key=keys[2])

    def gradients(dtype: mx.Dtype, product: Callable[[mx.array, mx.array], mx.array]) -> list[mx.array]:
        head = nn.Module()
        head.lm_head = nn.Linear(1, 1, bias=False)
        head.lm_head.weight = weight.astype(dtype)

        def loss(states: mx.array, given: mx.array) -> mx.array:
            head.lm_head.weight = given
            logprobs, entropies = chunked_logprobs(
                states, tokens, lambda x: product(x, head.lm_head.weight), 1.0, 16, True, head
            )
            return (logprobs * mx.arange(24)).mean() + 0.1 * entropies.mean()

        found = mx.grad(loss, argnums=[0, 1])(hidden.astype(dtype), weight.astype(dtype))
        return [array.astype(mx.float32) for array in found]

    def plain(x: mx.array, weight: mx.array) -> mx.array:
        return x @ weight.T

    exact, wide, rounded = gradients(mx.float32, plain), gradients(dtype, float32_product), gradients(dtype, plain)
    for name, one, other, reference in zip(("states", "weight"), wide, rounded, exact, strict=True):
        off, also = ((mx.linalg.norm(a - reference) / mx.linalg.norm(reference)).item() for a in (one, other))
        bound = 3e-3 if dtype == mx.bfloat16 else 5e-4  # the result itself is rounded to 2^-9, or 2^-12
        assert off < bound, name
        assert also > 2 * off, name


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("kind", ["untied", "quantised"])
def test_every_way_of_decoding_and_training_meets_the_same_head(kind: str) -> None:
    model = half_model(kind, mx.bfloat16, wide=True, sharpness=8)
    shapes, blocks = cache_shapes(model), read(model)
    assert shapes is not None
    assert blocks is not None
    ways = [
        SharedPrefix(model, BlockDecoder(blocks), StockAttention(), shapes, 128, ""),
        SharedPrefix(model, ModelDecoder(model), StockAttention(), shapes, 128, ""),
        BatchCaches(model, 128),
        BatchCaches(model, 128, joined=False),
    ]
    body, _ = halves(model)
    cast(reference := half_model(kind, mx.bfloat16, wide=False, sharpness=8), mx.float32)
    exact = halves(reference)[1](body(mx.array([[1, 2, 3, 4]]), cache=None).astype(mx.float32))[0, -1]
    for way in ways:
        session = way.open(Size(slots=1, places=1, prefix=3, columns=2))
        session.admit([0], [Line(SharedPrompt([1, 2, 3, 4]))])
        logits = session.logits(mx.array([4], mx.uint32))
        assert logits.dtype == mx.float32
        # The hidden states differ by their own rounding: what bfloat16 logits of 10 cannot tell apart is 0.06.
        assert largest(logits - exact) < 0.25
    policy = Policy(model, Adapters(model, AdapterConfig(rank=2), mx.random.key(0)), 1.0, share_prompts=False)
    ids = mx.array([[5, 6]])
    forced, _ = policy.logprobs(mx.array([[1, 2, 3, 4, 5, 6]]), mx.array([4]), ids)
    states = policy.group_hidden(mx.array([[1, 2, 3, 4]]), mx.array([4]), mx.array([0]), ids).astype(mx.float32)
    plain = body(mx.array([[1, 2, 3, 4, 5, 6]]), cache=None)[:, 3:5].astype(mx.float32)
    assert largest(states - plain) < 0.1  # attention in tiles rounds bfloat16 elsewhere
    scores = halves(reference)[1](states)
    expected = mx.take_along_axis(scores, ids[..., None], axis=-1)[..., 0] - mx.logsumexp(scores, axis=-1)
    assert largest(forced - expected) < 1e-5


def test_the_fastest_decoding_is_still_chosen() -> None:
    """Decoding agrees with the forward pass as far as the body's dtype lets it, not the logits'."""
    model = half_model("tied", mx.bfloat16, wide=True)
    assert find_decoding(model).description.startswith("joined layers")


@pytest.mark.parametrize("sharing", [True, False])
def test_whole_weights_train_through_a_widened_tied_head(sharing: bool) -> None:
    model = half_model("tied", mx.bfloat16, wide=True)
    policy = Policy(model, Adapters(model, AdapterConfig(type="full"), mx.random.key(0)), 1.0, sharing)
    prompts, lengths, index = mx.array([[1, 2, 3]]), mx.array([3]), mx.array([0, 0])

    def loss(_: nn.Module) -> mx.array:
        return policy.group_logprobs(prompts, lengths, index, mx.array([[4, 5], [6, 7]]))[0].sum()

    value, gradient = nn.value_and_grad(model, loss)(model)
    assert value.dtype == mx.float32
    weight = dict(tree_flatten(gradient))["model.embed_tokens.weight"]
    assert weight.dtype == mx.bfloat16
    assert (mx.abs(weight).sum(axis=1) > 0).all().item()  # the head reads every row
    assert isinstance(wide_head(model), WideEmbedding)


def test_the_matrix_is_never_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widehead, "CHUNK", 2**15)
    head = nn.Module()
    head.lm_head = WideEmbedding(8192, 512)  # 16 MB as float32, in 128 pieces
    head.lm_head.weight = head.lm_head.weight.astype(mx.bfloat16)
    hidden = mx.random.normal((4, 512)).astype(mx.bfloat16)
    mx.eval(hidden, head.parameters())
    planned = bytes_at_work(head, gpu=False)
    assert planned == HELD_ON_CPU * 2**17 < 2**24 / 6
    assert bytes_at_work(head, gpu=True) == HELD * 2**17
    logits = 4 * 4 * 8192

    def peak(function: Callable[[], Any]) -> int:
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(function())
        return mx.get_peak_memory() - before

    assert peak(lambda: head.lm_head.as_linear(hidden)) < planned + 4 * logits
    assert peak(lambda: mx.grad(lambda x: head.lm_head.as_linear(x).sum())(hidden)) < planned + 6 * logits


def test_loading_chooses(qwen3_folder) -> None:
    name = str(qwen3_folder)
    wide, _ = load(ModelConfig(name=name, dtype="bfloat16"))
    assert wide(mx.array([[1]])).dtype == mx.float32
    assert head_note(wide, ModelConfig(name=name)) == (
        "logits are float32, from bfloat16 hidden states (model.head_dtype)"
    )
    quantised, _ = load(ModelConfig(name=name, dtype="float16", quantize=4, head_dtype="float32"))
    assert quantised(mx.array([[1]])).dtype == mx.float32
    asked = ModelConfig(name=name, dtype="bfloat16", head_dtype="model")
    plain, _ = load(asked)
    assert plain(mx.array([[1]])).dtype == mx.bfloat16
    assert wide_head(plain) is None
    assert bytes_at_work(plain, gpu=True) == 0
    assert head_note(plain, asked) == (
        "logits are rounded to bfloat16, as model.head_dtype says: logprobs are up to 0.08 nats off"
    )


def test_a_float32_model_has_nothing_to_choose(toy_folder) -> None:
    with pytest.raises(ValidationError, match=r"head_dtype does nothing with model\.dtype: float32"):
        ModelConfig(name="x", dtype="float32", head_dtype="float32")
    asked = ModelConfig(name=str(toy_folder), head_dtype="float32")  # `auto` is float32 on a CPU
    model, _ = load(asked)
    assert wide_head(model) is None
    assert head_note(model, ModelConfig(name="x")) is None
    note = head_note(model, asked)
    assert note is not None
    assert "changes nothing here" in note


def test_a_head_that_is_not_found_is_refused_or_told(monkeypatch: pytest.MonkeyPatch, toy_folder) -> None:
    monkeypatch.setattr(loading, "widen_head", lambda _: False)
    with pytest.raises(UserError, match=r"model\.head_dtype: float32: the head of .* cannot compute in float32"):
        load(ModelConfig(name=str(toy_folder), dtype="bfloat16", head_dtype="float32"))
    auto = ModelConfig(name=str(toy_folder), dtype="bfloat16")
    note = head_note(load(auto)[0], auto)
    assert note is not None
    assert "because grpo found no head that this machine can multiply by in float32" in note


def test_a_quantized_head_that_a_gpu_cannot_multiply_by_stays_as_it_is(monkeypatch) -> None:
    model = make_model("quantised")
    cast(model, mx.bfloat16)

    def uncompiled(*_: Any) -> Any:
        raise RuntimeError("catastrophic error detected in the compilation of qmm_sm90_tn_float32")

    monkeypatch.setattr(widehead, "on_gpu", lambda: True)
    monkeypatch.setattr(mx, "eval", uncompiled)
    assert not widehead.widen_head(model)
    monkeypatch.undo()
    assert model(mx.array([[0, 1]])).dtype == mx.bfloat16
    assert widehead.widen_head(model)
