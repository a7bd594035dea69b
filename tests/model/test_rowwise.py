"""Row-wise parts of checkpointed layers in tiles of tokens: the same numbers and gradients, with less memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import shaken
from mlx.utils import tree_flatten, tree_unflatten

from grpo.backend.maths import swiglu
from grpo.config import AdapterConfig
from grpo.model import attending, dropout, rowwise
from grpo.model.adapters import Adapters
from grpo.model.dropout import LoRADropout, dropping, second_pass
from grpo.model.lines import laid_out
from grpo.model.pieces import in_pieces
from grpo.model.policy import Policy
from grpo.model.rowwise import RowWise

PROMPTS, LENGTHS, INDEX = mx.array([[1, 2, 3, 9], [4, 5, 0, 0]]), mx.array([4, 2]), mx.array([0, 0, 1])
COMPLETIONS = mx.array([[6, 7, 8, 20, 21], [9, 10, 11, 22, 23], [12, 13, 14, 24, 25]])
KEY = mx.random.key(3)
BLOCK = 4


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of four tokens: 15 tokens of completions and 8 of prompts make four tiles, the last shorter, and two."""
    for module in (rowwise, dropout):
        monkeypatch.setattr(module, "BLOCK", BLOCK)
    monkeypatch.setattr(rowwise, "NUMBERS", {False: 1})


def policy_of(model: nn.Module, kind: str, drop: float, **how: Any) -> Policy:
    adapters = Adapters(
        model, AdapterConfig(type=kind, **({} if kind == "full" else {"rank": 4, "dropout": drop})), KEY
    )
    if kind != "full":
        adapters.load_state(shaken(adapters.state()))
    return Policy(model, adapters, 1.0, **how)


def gradient(policy: Policy, checkpointing: bool | int, key: mx.array | None = None) -> dict[str, mx.array]:
    """Of a sum with weights, in which no token's part is like another's; and the logprobs."""
    policy.gradient_checkpointing = checkpointing
    weights = mx.random.normal(COMPLETIONS.shape, key=mx.random.key(5))

    def loss(_: nn.Module) -> tuple[mx.array, mx.array]:
        with dropping(key):
            (found,) = policy.group_logprobs(PROMPTS, LENGTHS, INDEX, COMPLETIONS, entropies=False)
        return (found * weights).sum(), found

    with policy.training():
        (_, logprobs), found = nn.value_and_grad(policy.model, loss)(policy.model)
    arrays = tree_flatten(found, destination={})
    mx.eval(logprobs, arrays)
    return {**arrays, "logprobs": logprobs}


def gap(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """The largest difference of an array's, relative to its largest number."""
    assert one.keys() == other.keys()
    sizes = {path: mx.abs(array).max().item() for path, array in one.items()}
    assert all(sizes.values()), "a gradient that is 0 shows nothing"
    return max(mx.abs(one[path] - other[path]).max().item() / size for path, size in sizes.items())


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which parts have been computed in tiles since, and of how many tokens."""
    seen: list[tuple[str, int]] = []

    def watched(function: Callable[..., Any], rows: mx.array, size: int, module: nn.Module, parameters: Any) -> Any:
        seen.append((type(module).__name__, len(rows)))
        return in_pieces(function, rows, size, module, parameters)

    monkeypatch.setattr(rowwise, "in_pieces", watched)
    return seen


@pytest.mark.each_value
@pytest.mark.parametrize("shares", [True, False], ids=["shared prompts", "whole sequences"])
@pytest.mark.parametrize(
    ("name", "kind", "drop"),
    [
        ("tied", "lora", 0.0),
        ("tied", "lora", 0.3),
        ("tied", "dora", 0.0),
        ("tied", "dora", 0.3),
        ("tied", "full", 0.0),
        ("quantised", "lora", 0.0),
        ("quantised", "dora", 0.3),
        ("gemma2", "lora", 0.0),
        ("cohere", "full", 0.0),
        ("moe", "lora", 0.0),
        ("moe", "full", 0.0),
    ],
)
def test_gradients_are_those_of_layers_that_keep_everything(
    zoo, tiles, name: str, kind: str, drop: float, shares: bool
) -> None:
    policy = policy_of(zoo(name), kind, drop, share_prompts=shares)
    key = KEY if drop else None
    plain, checkpointed = (gradient(policy, on, key) for on in (False, True))
    assert gap(plain, checkpointed) < 3e-6
    assert {length for _, length in tiles} == ({8, 15} if policy.share_prompts else {27})
    assert not any("MLP" in reason for reason in policy.slow)


def test_the_first_layers_alone_are_in_tiles_if_they_alone_are_checkpointed(zoo, tiles) -> None:
    policy = policy_of(zoo("tied"), "lora", 0.0)
    gradient(policy, 1)
    first = len(tiles)
    tiles.clear()
    gradient(policy, 2)
    assert 0 < 2 * first == len(tiles)
    tiles.clear()
    gradient(policy, False)
    assert tiles == []


def test_lines_and_compiled_updates_get_the_same_gradients(zoo, tiles) -> None:
    policy = policy_of(zoo("tied"), "lora", 0.3)
    assert policy.packs
    prompts = [row[:length] for row, length in zip(PROMPTS.tolist(), LENGTHS.tolist(), strict=True)]
    rows = [
        (tuple(prompts[index]), tuple(own)) for index, own in zip(INDEX.tolist(), COMPLETIONS.tolist(), strict=True)
    ]
    lines, starts = laid_out(rows, 2, 13)

    def found(arrays: dict[str, mx.array], key: mx.array) -> dict[str, mx.array]:
        def loss(_: nn.Module) -> mx.array:
            with dropping(key):
                (logprobs,) = policy.line_logprobs(lines, mx.array(starts), 5, entropies=False)
            return (logprobs * mx.arange(1, 6)).sum()

        policy.model.update(tree_unflatten(list(arrays.items())))
        with policy.training():
            return tree_flatten(nn.value_and_grad(policy.model, loss)(policy.model)[1], destination={})

    arrays = tree_flatten(policy.model.trainable_parameters(), destination={})
    plain = found(arrays, KEY)
    mx.eval(plain)
    policy.gradient_checkpointing = True
    compiled = mx.compile(found)
    assert gap(plain, compiled(arrays, KEY)) < 3e-6
    assert {length for _, length in tiles} == {lines[0].size}
    policy.model.update(tree_unflatten(list(arrays.items())))  # in the place of what was traced
    assert gap(compiled(arrays, mx.random.key(8)), compiled(arrays, KEY)) > 0.01


def test_each_block_of_rows_has_a_mask_of_its_own_wherever_it_is_drawn() -> None:
    layer, x = LoRADropout(0.5, 7), mx.ones((3 * BLOCK - 1, 32))
    with dropping(KEY):
        whole, first = layer(x), layer(x[:BLOCK])
    with dropping(KEY, 2 * BLOCK):
        last = layer(x[2 * BLOCK :])
    with dropping(KEY), second_pass():
        second = layer(x)
    assert mx.array_equal(whole[:BLOCK], first)
    assert mx.array_equal(whole[2 * BLOCK :], last)
    blocks = [array[start : start + BLOCK - 1] for array in (whole, second) for start in range(0, 3 * BLOCK, BLOCK)]
    same = [(one == other).mean().item() for one, other in combinations(blocks, 2)]
    assert max(same) < 0.75  # of numbers that fall one way or the other, half are the same by chance


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_memory_grows_with_the_tile_and_not_with_the_tokens(monkeypatch: pytest.MonkeyPatch, zoo, kind: str) -> None:
    monkeypatch.setattr(rowwise, "BLOCK", 64)
    policy = policy_of(zoo("tied", hidden_size=16, intermediate_size=1024, num_hidden_layers=1), kind, 0.0)
    layer, part = policy.model.layers[0], policy.model.layers[0].mlp
    x = mx.random.normal((1, 4096, 16), key=KEY)

    def peak(inside: AbstractContextManager[None]) -> int:
        given = part.trainable_parameters()

        def loss(given: Any, x: mx.array) -> mx.array:
            part.update(given)
            with inside:
                return part(x).sum()

        mx.eval(given, x)
        resting = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(loss, argnums=(0, 1))(given, x))
        part.update(given)
        return mx.get_peak_memory() - resting

    inner = 4096 * 1024 * 4  # bytes of what is inside, once
    assert peak(nullcontext()) > 3 * inner
    assert peak(policy._row_wise.inside(layer)) < inner


def test_the_backward_pass_gates_as_the_forward_pass_does(zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes to a tile when the forward pass through the model is over."""
    calls = list[int]()

    def counted(gate: mx.array, x: mx.array) -> mx.array:
        calls.append(gate.shape[1])
        return swiglu(gate, x)

    monkeypatch.setitem(attending.OURS, "swiglu", counted)
    policy = policy_of(zoo("tied"), "lora", 0.0)
    calls.clear()
    gradient(policy, True)
    tokens = [4, 4, 4, 3, 4, 4]  # of completions and of prompts
    passes = 3  # forward, the layer again, the tile again
    assert sorted(calls) == sorted(tokens * passes * len(policy.model.layers))


def test_experts_that_drop_numbers_stay_whole(zoo, tiles) -> None:
    """They sort tokens, so that a mask by place would be another one in a tile."""
    policy = policy_of(zoo("moe"), "lora", 0.3)
    plain, checkpointed = (gradient(policy, on, KEY) for on in (False, True))
    assert gap(plain, checkpointed) < 3e-6
    assert tiles == []


class Layer(nn.Module):
    """Its attention takes a mask; what comes after it is given."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.attention, self.part = Twice(), part

    def __call__(self, x: mx.array, mask: None = None) -> mx.array:
        return self.part(x + self.attention(x, mask))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def __call__(self, x: mx.array, _mask: None = None) -> mx.array:
        return self.second(mx.tanh(self.first(x)))


class Mean(Twice):
    """Of all tokens."""

    def __call__(self, x: mx.array) -> mx.array:  # type: ignore[override]
        return super().__call__(x.mean(axis=1, keepdims=True) + 0 * x)


class Nothing(Twice):
    """A block that was put into a model to grow: its last matrix begins as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = mx.zeros((8, 8))

    def __call__(self, x: mx.array) -> mx.array:  # type: ignore[override]
        return super().__call__(x)


class Narrow(Twice):
    """Not made for a single token."""

    def __call__(self, x: mx.array) -> mx.array:  # type: ignore[override]
        return super().__call__(x.reshape(-1, 3, 8))


class Model(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.layers = [Layer(part)]

    def __call__(self, tokens: mx.array, cache: None = None) -> mx.array:
        return self.layers[0](mx.random.normal((*tokens.shape, 8), key=KEY))


def test_what_is_called_with_tokens_alone_and_takes_each_by_itself_is_in_tiles() -> None:
    model = Model(Twice())
    found, layer = RowWise(model), model.layers[0]
    assert found.fault is None
    assert len(found) == 1
    assert type(layer.part) is Twice
    with found.inside(layer):
        assert type(layer.part) is not Twice
        assert type(layer.attention) is Twice
    assert type(layer.part) is Twice


def test_fewer_tokens_than_two_tiles_are_computed_at_once(tiles) -> None:
    model = Model(Twice())
    layer = model.layers[0]
    with RowWise(model).inside(layer):
        layer.part(mx.ones((1, 2 * BLOCK - 1, 8)))
        assert tiles == []
        layer.part(mx.ones((2, BLOCK, 8)))
    assert tiles == [("Twice", 2 * BLOCK)]


def test_what_mixes_tokens_is_not() -> None:
    model = Model(Mean())
    found = RowWise(model)
    assert found.fault
    assert "Mean gives a token another result among other tokens" in found.fault
    assert len(found) == 0
    assert type(model.layers[0].part) is Mean


def test_what_gives_zeros_is_tried_as_any_other() -> None:
    found = RowWise(Model(Nothing()))
    assert (found.fault, len(found)) == (None, 1)


def test_a_trial_that_fails_says_why() -> None:
    found = RowWise(Model(Narrow()))
    assert found.fault
    assert "Narrow: ValueError in " in found.fault
    assert len(found) == 0
