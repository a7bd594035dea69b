"""Checkpointed layers' inputs in a vault: the same gradient to the bit, and nothing else holds them."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import StringIO
from typing import Any

import mlx.core as mx
import pytest
from architectures.small import COMMON, SMALL
from backend.locking import copying, locking
from model.test_attending import lines_logprobs, rows_logprobs
from model.test_sharing import COMPLETIONS, INDEX, LENGTHS, PROMPTS, policy_of
from model.test_some_layers import gradient
from model.vaults import Doubled, Emptied

from grpo.backend import pinned
from grpo.errors import UserError
from grpo.model import mlxlm
from grpo.model.dropout import add_dropout
from grpo.model.offloading import OnHost, host_bytes, keeping_in, vault_of
from grpo.model.policy import Policy


def same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(mx.array_equal(one[path], other[path]).item() for path in one)


def offloaded(policy: Policy, logprobs: Callable[[Policy], mx.array], layers: bool | int = True) -> Doubled:
    """The vault, after the gradient was seen to be what it is without."""
    policy.gradient_checkpointing = layers
    expected = gradient(policy, logprobs)
    vault = policy.vault = Doubled()
    found = gradient(policy, logprobs)
    assert same(expected, found)
    assert vault.taken == len(vault.stored)
    assert vault.begun == 1
    return vault


@pytest.mark.parametrize("kind", ["tied", "moe", "quantised", "gemma3_text", "recurrent"])
def test_the_gradient_is_the_same_to_the_bit(zoo, kind: str) -> None:
    policy = policy_of(mlxlm.new_model({**COMMON, **SMALL["Qwen3-Next"]}) if kind == "recurrent" else zoo(kind))
    vault = offloaded(policy, rows_logprobs)
    passes = 2 if policy.share_prompts else 1
    assert len(vault.stored) == passes * len(policy.model.layers)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_so_it_is_in_lines_and_for_all_that_trains(zoo, kind: str) -> None:
    policy = policy_of(zoo("tied"), kind)
    assert policy.packs
    assert len(offloaded(policy, lines_logprobs).stored) == len(policy.model.layers)


def test_so_it_is_with_dropout_and_prompts_that_are_not_shared(zoo) -> None:
    policy = policy_of(zoo("tied"), share_prompts=False)
    add_dropout(policy.model, 0.3)
    assert len(offloaded(policy, rows_logprobs).stored) == len(policy.model.layers)


def test_layers_that_are_not_checkpointed_put_nothing_away(zoo) -> None:
    policy = policy_of(zoo("tied", num_hidden_layers=3))
    assert len(offloaded(policy, lines_logprobs, 2).stored) == 2
    assert offloaded(policy, lines_logprobs, False).stored == []


def test_nor_does_a_pass_without_a_gradient(zoo) -> None:
    policy = policy_of(zoo("tied"), gradient_checkpointing=True)
    vault = policy.vault = Doubled()
    mx.eval(policy.group_logprobs(PROMPTS, LENGTHS, INDEX, COMPLETIONS))
    assert vault.stored == []
    gradient(policy, rows_logprobs)
    before = len(vault.stored)
    assert before > 0
    mx.eval(policy.group_logprobs(PROMPTS, LENGTHS, INDEX, COMPLETIONS))
    assert len(vault.stored) == before


def test_the_backward_pass_reads_the_vault_alone(zoo) -> None:
    policy = policy_of(zoo("tied"), gradient_checkpointing=True)
    expected = gradient(policy, rows_logprobs)
    policy.vault = Emptied()
    assert not same(expected, gradient(policy, rows_logprobs))


def test_the_host_s_memory_gives_back_what_was_put_there(zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next gradient is written over it."""
    driver, arena = locking(monkeypatch), pinned.Arena()
    monkeypatch.setattr(pinned, "arena", lambda: arena)
    monkeypatch.setattr(pinned, "kernel", copying)
    policy = policy_of(zoo("tied", num_hidden_layers=3), gradient_checkpointing=True)
    expected = [gradient(policy, logprobs) for logprobs in (rows_logprobs, lines_logprobs)]
    policy.vault = OnHost()
    for _ in range(2):
        assert same(expected[0], gradient(policy, rows_logprobs))
        assert same(expected[1], gradient(policy, lines_logprobs))
    assert [size for _, size in driver.locked] == [pinned.PIECE]
    assert policy.notes == [
        "the inputs of checkpointed layers are stored in the machine's memory, not the device's: 0.1 GB of it"
    ]


LAYERS, TOKENS, WIDTH = 160, 512, 16


def stacked(checkpoint: Callable[[Any], Any]) -> int:
    """Bytes at the peak of a gradient through layers whose work takes a few times their input."""
    weights = [mx.random.normal((WIDTH, WIDTH), key=key) / 8 for key in mx.random.split(mx.random.key(0), LAYERS)]
    x = mx.random.normal((TOKENS, WIDTH), key=mx.random.key(1))
    layer = checkpoint(lambda weight, x: x + mx.tanh(x @ weight))
    mx.eval(weights, x)

    def loss(weights: list[mx.array]) -> mx.array:
        hidden = x
        for weight in weights:
            hidden = layer(weight, hidden)
        return hidden.square().sum()

    resting = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(loss)(weights))
    return mx.get_peak_memory() - resting


def test_no_layers_input_stays_on_the_device() -> None:
    inputs = 4 * TOKENS * WIDTH * LAYERS
    assert stacked(mx.checkpoint) > inputs
    assert stacked(keeping_in(Emptied())) < inputs / 2  # some are on their way


def test_an_input_comes_back_when_the_gradient_of_what_was_made_of_it_is_there() -> None:
    """Or MLX might fetch it as soon as it was put away."""
    layer = keeping_in(Doubled())(lambda weight, x: x @ weight)
    drawing = StringIO()
    mx.export_to_dot(drawing, mx.grad(lambda weight: layer(weight, mx.ones((2, 2))).sum())(mx.ones((2, 2))))
    drawn = drawing.getvalue()
    (taking,) = re.findall(r"(\d+) \[label =\"Divide\"", drawn)
    (waiting,) = re.findall(r"(\d+) \[label =\"Depends\"", drawn)
    (waited,) = re.findall(rf'^"(\w+)" -> {taking}$', drawn, re.MULTILINE)[:1]
    assert waited in re.findall(rf'^{waiting} -> "(\w+)"$', drawn, re.MULTILINE)


@pytest.mark.slow  # a C++ compiler at work
def test_a_compiled_gradient_is_the_same() -> None:
    weights = [mx.random.normal((16, 16), key=key) / 4 for key in mx.random.split(mx.random.key(0), 3)]
    x = mx.random.normal((32, 16), key=mx.random.key(1))
    layer = keeping_in(Doubled())(lambda given, x: x + mx.tanh(x @ given["weight"]))

    def loss(weights: list[mx.array]) -> mx.array:
        hidden = x
        for weight in weights:
            hidden = layer({"weight": weight}, hidden)
        return hidden.square().sum()

    expected = mx.grad(loss)(weights)
    mx.enable_compile()
    try:
        made = mx.compile(mx.grad(loss))
        for found in (made(weights), made(weights)):
            assert all(mx.allclose(one, other, 1e-6, 1e-6).item() for one, other in zip(found, expected, strict=True))
    finally:
        mx.disable_compile()


def test_what_a_micro_batch_takes_of_the_host() -> None:
    assert host_bytes(36, 110_000, 4_096, 2) == pytest.approx(36 * 110_000 * 4_096 * 2, rel=0.01)
    assert host_bytes(1, 1, 1, 4) == pinned.PIECE


def test_machines_with_one_memory_are_told_so() -> None:
    assert vault_of(False) is None
    with pytest.raises(
        UserError, match="offload_activations: this run is on a CPU, which computes in the machine's own"
    ):
        vault_of(True)
