"""The prompt once per group: the same loss and gradients as whole sequences, for every kind of model that can."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import shaken
from mlx.utils import tree_flatten

from grpo.config import AdapterConfig
from grpo.model.adapters import Adapters
from grpo.model.policy import Policy
from grpo.model.sharing import Unshared, shared_layers

PROMPTS = mx.random.randint(1, 100, (4, 9), key=mx.random.key(1))
LENGTHS = mx.array([9, 4, 6, 1])  # ragged; the last prompt is a single token, and no row's
INDEX = mx.array([0, 0, 1, 2, 2, 2])
COMPLETIONS = mx.random.randint(1, 100, (6, 7), key=mx.random.key(2))
# Ragged completions: what is behind their ends does not count.
WEIGHTS = mx.random.normal((6, 7), key=mx.random.key(3)) * (mx.arange(7)[None] < mx.array([7, 2, 5, 1, 7, 6])[:, None])


def policy_of(model: nn.Module, kind: str = "lora", **settings: Any) -> Policy:
    adapters = Adapters(model, AdapterConfig(type=kind, **({} if kind == "full" else {"rank": 4})), mx.random.key(0))
    if kind != "full":
        adapters.load_state(shaken(adapters.state()))
    return Policy(model, adapters, 0.9, **settings)


def loss_and_gradient(policy: Policy) -> tuple[float, dict[str, mx.array]]:
    def loss(_: nn.Module) -> mx.array:
        logprobs, entropy = policy.group_logprobs(PROMPTS, LENGTHS, INDEX, COMPLETIONS, entropy_gradient=True)
        return ((logprobs + 0.1 * entropy) * WEIGHTS).sum()

    value, gradient = nn.value_and_grad(policy.model, loss)(policy.model)
    mx.eval(value, gradient)
    return value.item(), dict(tree_flatten(gradient))


def difference(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """The largest difference, relative to the largest number of all."""
    largest = max(mx.abs(array).max().item() for array in one.values())
    return max(mx.abs(one[path] - other[path]).max().item() for path in one) / largest


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["dense", "tied", "untied", "moe", "quantised", "gemma3_text", "cohere", "granite"])
@pytest.mark.parametrize("checkpointing", [False, True, 1])
def test_shared_prompts_give_the_plain_ways_loss_and_gradient(zoo, kind: str, checkpointing: bool | int) -> None:
    policy = policy_of(zoo(kind))
    assert policy.share_prompts
    assert policy.slow == []
    policy.share_prompts = False
    plain, expected = loss_and_gradient(policy)
    policy.share_prompts, policy.gradient_checkpointing = True, checkpointing
    shared, gradient = loss_and_gradient(policy)
    assert shared == pytest.approx(plain, rel=1e-5)
    assert difference(expected, gradient) < 1e-5


@pytest.mark.parametrize(("base", "kind"), [("tied", "full"), ("untied", "full"), ("tied", "dora")])
def test_so_do_weights_that_train_themselves(zoo, base: str, kind: str) -> None:
    """The head's gradient and the embedding's included, which pass through checkpoints."""
    policy = policy_of(zoo(base), kind)
    policy.share_prompts = False
    plain, expected = loss_and_gradient(policy)
    policy.share_prompts, policy.gradient_checkpointing = True, True
    shared, gradient = loss_and_gradient(policy)
    assert shared == pytest.approx(plain, rel=1e-5)
    assert difference(expected, gradient) < 1e-5
    policy.split = None  # and all of it without chunks or checkpoints of the head
    policy.share_prompts = policy.gradient_checkpointing = False
    assert difference(expected, loss_and_gradient(policy)[1]) < 1e-5


def test_a_model_that_cannot_share_goes_the_plain_way_and_says_why(zoo) -> None:
    policy = policy_of(zoo("gemma2"))
    assert not policy.share_prompts
    attention, said = policy.slow
    assert "this architecture computes it itself" in attention
    assert "does not take positions and masks by row" in said
    assert mx.isfinite(policy.group_logprobs(PROMPTS, LENGTHS, INDEX, COMPLETIONS)[0]).all().item()


def test_layers_that_keep_anything_else_are_named(zoo, monkeypatch) -> None:
    from mlx_lm.models.cache import CacheList, KVCache

    model = zoo("tied")
    monkeypatch.setattr(type(model), "make_cache", lambda self: [CacheList(KVCache()) for _ in self.layers], False)
    with pytest.raises(Unshared, match="CacheList"):
        shared_layers(model, model.model)


def test_attention_that_is_not_relative_is_found_out(zoo) -> None:
    model = zoo("tied")
    body = model.model

    def odd(tokens: mx.array, cache: Any = None) -> mx.array:
        return body(tokens, cache=cache) * (tokens.shape[1] + 1.0)  # depends on how much comes at once

    with pytest.raises(Unshared, match="depends on more than"):
        shared_layers(model, odd)


def test_sharing_can_be_left_out(zoo) -> None:
    policy = policy_of(zoo("tied"), share_prompts=False)
    assert not policy.share_prompts
    assert policy.slow == []


def test_fewer_tokens_go_through_the_model(zoo) -> None:
    policy = policy_of(zoo("tied"))
    body, head = policy.split
    seen = []

    def counting(tokens: mx.array, cache: Any = None) -> mx.array:
        seen.append(tokens.size)
        return body(tokens, cache=cache)

    policy.split = (counting, head)
    loss_and_gradient(policy)
    assert sum(seen) == PROMPTS.size + COMPLETIONS.size


def test_checkpointing_does_not_touch_generation(zoo) -> None:
    model = zoo("tied")
    before = type(model.layers[0])
    policy = policy_of(model, gradient_checkpointing=True)
    loss_and_gradient(policy)
    assert all(type(layer) is before for layer in model.layers)
    parameters = dict(tree_flatten(model.parameters()))
    policy.group_logprobs(PROMPTS, LENGTHS, INDEX, COMPLETIONS)
    assert all(array is parameters[path] for path, array in tree_flatten(model.parameters()))


def test_checkpointing_takes_less_memory(zoo) -> None:
    peaks = []
    for checkpointing in (False, True):
        policy = policy_of(zoo("tied", num_hidden_layers=12), gradient_checkpointing=checkpointing)
        loss_and_gradient(policy)
        resting = mx.get_active_memory()
        mx.reset_peak_memory()
        loss_and_gradient(policy)
        peaks.append(mx.get_peak_memory() - resting)
    assert peaks[1] < peaks[0] / 2
