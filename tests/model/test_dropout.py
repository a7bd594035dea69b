"""LoRA's dropout: PEFT's formula, on in the update alone, and the same masks wherever a forward pass is made again."""

from __future__ import annotations

import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import shaken
from mlx.utils import tree_flatten

from grpo.config import AdapterConfig
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.adapters import Adapters, load_adapter
from grpo.model.dropout import LoRADropout, dropout_key, dropping, second_pass
from grpo.model.policy import Policy

PROMPTS, LENGTHS, INDEX = mx.array([[1, 2, 3], [4, 5, 0]]), mx.array([3, 2]), mx.array([0, 0, 1])
COMPLETIONS = mx.array([[6, 7, 8], [9, 10, 11], [12, 13, 14]])
KEY = mx.random.key(3)


def policy_of(model, kind: str = "lora", **how) -> Policy:
    adapters = Adapters(model, AdapterConfig(type=kind, rank=4, dropout=0.3), mx.random.key(0))
    adapters.load_state(shaken(adapters.state()))
    return Policy(model, adapters, 1.0, **how)


def logprobs(policy: Policy, key: mx.array | None) -> mx.array:
    with dropping(key):
        found, _ = policy.group_logprobs(PROMPTS, LENGTHS, INDEX, COMPLETIONS)
    return found


def gradient(policy: Policy, key: mx.array) -> dict[str, mx.array]:
    with policy.training():
        _, found = nn.value_and_grad(policy.model, lambda _: logprobs(policy, key).sum())(policy.model)
    return tree_flatten(found, destination={})


def gap(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    assert one.keys() == other.keys()
    return max(mx.abs(array - other[path]).max().item() for path, array in one.items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_layer_computes_what_peft_does_with_the_mask(zoo, kind: str) -> None:
    """PEFT: result + B(A(dropout(x))) · scaling, kept numbers over 1 - p; the base sees all of x."""
    policy = policy_of(zoo("tied"), kind)
    layer = policy.model.layers[1].mlp.up_proj
    x = mx.random.normal((2, 5, 64), key=mx.random.key(1))
    with dropping(KEY):
        out, again, dropped = np.array(layer(x)), np.array(layer(x)), np.array(layer.dropout(x.reshape(-1, 64)))
    dropped = dropped.reshape(2, 5, 64)
    assert np.array_equal(out, again)
    kept = dropped != 0
    assert 0.6 < kept.mean() < 0.8
    np.testing.assert_allclose(dropped, np.where(kept, np.array(x) / 0.7, 0), rtol=1e-6)
    w, a, b = (np.array(array) for array in (layer.linear.weight, layer.lora_a, layer.lora_b))
    expected = np.array(x) @ w.T + layer.scale * dropped @ a @ b
    if kind == "dora":
        expected *= np.array(layer.m) / np.linalg.norm(w + layer.scale * (a @ b).T, axis=1)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=2e-5)


def test_the_gradient_is_the_formulas(zoo) -> None:
    layer = policy_of(zoo("tied")).model.layers[0].mlp.up_proj
    x, slope = (mx.random.normal((6, 64), key=mx.random.key(n)) for n in (1, 2))

    def loss(a: mx.array, b: mx.array, x: mx.array) -> mx.array:
        layer.lora_a, layer.lora_b = a, b
        return (layer(x) * slope).sum()

    a, b = layer.lora_a, layer.lora_b
    with dropping(KEY):
        to_a, to_b, to_x = (np.array(g) for g in mx.grad(loss, argnums=(0, 1, 2))(a, b, x))
        layer.lora_a, layer.lora_b = a, b
        dropped = np.array(layer.dropout(x))
    w, a, b, g, s = (np.array(one) for one in (layer.linear.weight, a, b, slope, mx.array(layer.scale)))
    np.testing.assert_allclose(to_a, s * dropped.T @ (g @ b.T), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(to_b, s * (dropped @ a).T @ g, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(to_x, g @ w + s * (g @ b.T @ a.T) * (dropped != 0) / 0.7, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["tied", "moe", "quantised"])
def test_nothing_is_dropped_unless_a_key_is_set(zoo, base: str) -> None:
    with_dropout, model = policy_of(zoo(base)), zoo(base)
    adapters = Adapters(model, AdapterConfig(rank=4), mx.random.key(0))
    adapters.load_state(with_dropout.adapters.state())
    without = Policy(model, adapters, 1.0)
    with with_dropout.training(), without.training():  # mlx-lm's own dropout would be on
        assert mx.array_equal(logprobs(with_dropout, None), logprobs(without, None))
        assert mx.array_equal(logprobs(without, KEY), logprobs(without, None))
        assert mx.abs(logprobs(with_dropout, KEY) - logprobs(without, None)).max() > 1e-3


def test_a_saved_adapter_that_is_loaded_drops_nothing(zoo, tmp_path) -> None:
    """Its config says how it was trained, and mlx-lm's loader makes layers of it that would drop."""
    policy = policy_of(zoo("tied"))
    policy.adapters.save(tmp_path)
    assert policy.adapters.config["lora_parameters"]["dropout"] == 0.3
    loaded = zoo("tied")
    load_adapter(loaded, tmp_path)
    assert mx.allclose(loaded(PROMPTS), policy.model(PROMPTS), atol=1e-5)


def test_the_two_passes_of_shared_prompts_draw_other_masks(zoo) -> None:
    policy, seen = policy_of(zoo("tied")), []
    layer = policy.model.layers[0].self_attn.q_proj
    draw = layer.dropout
    layer.dropout = lambda x: seen.append(dropout_key()) or draw(x)
    logprobs(policy, KEY)
    assert len({tuple(key.tolist()) for key in seen}) == len(seen) == 2


def test_masks_depend_on_the_key_the_layer_and_the_pass_alone() -> None:
    x = mx.ones((50, 40))
    draws = {}
    for number in (0, 1):
        layer = LoRADropout(0.5, number)
        for key in (1, 2):
            with dropping(mx.random.key(key)):
                draws[number, key, 1] = layer(x)
                mx.random.normal((3,))  # draws from the global state do not matter
                assert mx.array_equal(layer(x), draws[number, key, 1])
                with second_pass():
                    draws[number, key, 2] = layer(x)
                assert mx.array_equal(layer(x), draws[number, key, 1])
    masks = [np.array(draw) > 0 for draw in draws.values()]
    for i, mask in enumerate(masks):
        assert abs(mask.mean() - 0.5) < 0.05
        for other in masks[:i]:
            assert abs((mask == other).mean() - 0.5) < 0.05  # as often as chance has it


@pytest.mark.parametrize("share", [True, False])
def test_layers_that_are_computed_again_drop_the_same_numbers(zoo, share: bool) -> None:
    policy = policy_of(zoo("tied"), share_prompts=share)
    assert policy.share_prompts == share
    kept = gradient(policy, KEY)
    policy.gradient_checkpointing = True
    assert gap(gradient(policy, KEY), kept) < 1e-5
    assert gap(gradient(policy, mx.random.key(4)), kept) > 1e-2


def test_dropout_keeps_the_mean(zoo) -> None:
    """Over many masks a linear layer's outputs are those without dropout."""
    layer = policy_of(zoo("tied")).model.layers[0].mlp.up_proj
    x = mx.random.normal((4, 64), key=mx.random.key(1))
    whole, total = layer(x), mx.zeros((4, 64))
    for key in mx.random.split(KEY, 400):
        with dropping(key):
            total = total + layer(x)
    spread = mx.abs(total / 400 - whole).max() / mx.abs(whole - layer.linear(x)).max()
    assert spread < 0.15


@pytest.mark.skipif(shutil.which("g++") is None, reason="mx.compile on a CPU calls a C++ compiler")
@pytest.mark.slow
def test_a_compiled_update_takes_the_key_as_an_input(zoo) -> None:
    policy = policy_of(zoo("tied", num_hidden_layers=1))
    policy.gradient_checkpointing = True
    plain = [gradient(policy, mx.random.key(n)) for n in (1, 2)]
    step = nn.value_and_grad(policy.model, lambda key: logprobs(policy, key).sum())
    mx.enable_compile()
    try:
        state = policy.model.state
        compiled = mx.compile(step, inputs=state, outputs=state)
        with policy.training():
            found = [tree_flatten(compiled(mx.random.key(n))[1], destination={}) for n in (1, 2)]
        mx.eval(found)
    finally:
        mx.disable_compile()
    assert gap(plain[0], plain[1]) > 1e-2
    assert all(gap(one, other) < 1e-4 for one, other in zip(found, plain, strict=True))


def test_decoding_drops_nothing(zoo, toy) -> None:
    """Its draws are those of the same adapter without dropout, by joined projections."""
    said = []
    for dropout in (0.0, 0.5):
        model = zoo("tied")
        adapters = Adapters(model, AdapterConfig(rank=4, dropout=dropout), mx.random.key(0))
        adapters.load_state(shaken(adapters.state()))
        generator = Generator(model, toy[1], slots=2)
        (row,) = generator.generate([Request((1, 2, 3), 2)], Sampling(1.0, 6), mx.random.key(1))
        said.append([(one.token_ids, one.behaviour) for one in row])
    assert said[0] == said[1]
