"""Policies whose attention is computed in tiles, against mlx-lm's own; and the patch by which it is."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import make_model, shaken
from mlx.utils import tree_flatten
from model.tiling import shrink_tiles

from grpo.backend.maths import swiglu
from grpo.config import AdapterConfig
from grpo.errors import UserError
from grpo.model import mlxlm
from grpo.model.adapters import Adapters
from grpo.model.attending import Forward, InTiles, asking_caches, attends
from grpo.model.lines import laid_out
from grpo.model.policy import Policy

LENGTHS = [11, 4, 7]
PROMPTS = mx.random.randint(1, 100, (3, 11), key=mx.random.key(1))
INDEX = mx.array([0, 0, 1, 2, 2, 1])
COMPLETIONS = mx.random.randint(1, 100, (6, 13), key=mx.random.key(2))
WEIGHTS = mx.random.normal((6, 13), key=mx.random.key(3))
FILE, NAME = "mlx_lm.models.qwen3", "scaled_dot_product_attention"


@pytest.fixture(autouse=True, params=["kept", "computed again"])
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch, 4, 200, request.param == "kept")


def policy_of(kind: str, **settings: Any) -> Policy:
    model = make_model(kind)
    adapters = Adapters(model, AdapterConfig(rank=4), mx.random.key(0))
    adapters.load_state(shaken(adapters.state()))
    return Policy(model, adapters, 0.9, **settings)


def rows_logprobs(policy: Policy) -> mx.array:
    return policy.group_logprobs(PROMPTS, mx.array(LENGTHS), INDEX, COMPLETIONS, entropies=False)[0]


def lines_logprobs(policy: Policy) -> mx.array:
    ids, completions = PROMPTS.tolist(), COMPLETIONS.tolist()
    rows = [(tuple(ids[i][: LENGTHS[i]]), tuple(own)) for i, own in zip(INDEX.tolist(), completions, strict=True)]
    laid, starts = laid_out(rows, 3, 40)
    return policy.line_logprobs(laid, mx.array(starts), 13, entropies=False)[0]


def gradient(policy: Policy, logprobs: Any) -> dict[str, mx.array]:
    """And the logprobs themselves."""

    def loss(_: nn.Module) -> tuple[mx.array, mx.array]:
        found = logprobs(policy)
        return (found * WEIGHTS).sum(), found

    (_, found), tree = nn.value_and_grad(policy.model, loss)(policy.model)
    return {"logprobs": found, **dict(tree_flatten(tree))}


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["tied", "moe", "gemma3_text"])
@pytest.mark.parametrize("way", ["plain", "shared", "checkpointed", "lines"])
def test_a_policy_s_gradient_is_that_of_mlx_lm_s_attention(kind: str, way: str, monkeypatch) -> None:
    policy = policy_of(kind, share_prompts=way != "plain", gradient_checkpointing=way == "checkpointed")
    assert policy.slow == []
    logprobs = lines_logprobs if way == "lines" else rows_logprobs
    assert policy.packs or way != "lines"
    forwards: list[Forward] = []
    monkeypatch.setattr(Forward, "under_way", _recorded(forwards))
    tiled = gradient(policy, logprobs)
    assert forwards
    passes = {"plain": 1, "lines": 1, "shared": 2, "checkpointed": 4}[way]  # of which two in the backward pass
    assert sum(forward.answered for forward in set(forwards)) == passes * len(policy.model.layers)
    assert not any(forward.declined for forward in forwards)
    policy._in_tiles = None
    expected = gradient(policy, logprobs)
    largest = max(mx.abs(array).max().item() for path, array in expected.items() if path != "logprobs")
    for path, array in expected.items():
        bound = 1e-5 if path == "logprobs" else 2e-6 * largest
        assert mx.abs(tiled[path] - array).max().item() < bound


def _recorded(forwards: list[Forward]) -> Any:
    original = Forward.under_way

    def under_way(self: Forward) -> Any:
        forwards.append(self)
        return original(self)

    return under_way


def test_windows_leave_out_what_no_query_sees(monkeypatch) -> None:
    """Masks that our caches have made are known for what they mean, and not read."""
    from grpo.model.sight import Masked

    monkeypatch.setattr(Masked, "__init__", lambda *_: pytest.fail("a mask was read"))
    gradient(policy_of("gemma3_text"), rows_logprobs)
    gradient(policy_of("gemma3_text"), lines_logprobs)


def test_mlx_lm_s_functions_are_back_afterwards() -> None:
    policy, file = policy_of("tied"), sys.modules[FILE]
    gradient(policy, rows_logprobs)
    assert getattr(file, NAME) is mlxlm.scaled_dot_product_attention
    assert file.swiglu is mlxlm.swiglu


def test_blocks_may_overlap() -> None:
    file = sys.modules[type(make_model("tied")).__module__]
    first, second = asking_caches([file]), asking_caches([file])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert getattr(file, NAME) is not mlxlm.scaled_dot_product_attention
    assert attends(make_model("tied")) == [file]  # who looks meanwhile finds it all the same
    second.__exit__(None, None, None)
    assert getattr(file, NAME) is mlxlm.scaled_dot_product_attention


def test_outside_a_forward_pass_attention_is_mlx_lm_s(monkeypatch) -> None:
    model, calls = make_model("tied"), []
    original = mlxlm.scaled_dot_product_attention
    monkeypatch.setattr(mlxlm, NAME, lambda *a, **k: calls.append(1) or original(*a, **k))
    monkeypatch.setattr(sys.modules[FILE], NAME, mlxlm.scaled_dot_product_attention)
    with asking_caches([sys.modules[FILE]]):
        model(mx.array([[1, 2, 3]]))
        assert len(calls) == len(model.layers)
        with InTiles(model).begun() as forward:
            model(mx.array([[1, 2, 3]]))
    assert len(calls) == forward.answered == len(model.layers)


def test_a_model_with_attention_of_its_own_is_named() -> None:
    assert any("this architecture computes it itself" in reason for reason in policy_of("gemma2").slow)


def test_attention_that_cannot_be_computed_in_tiles_is_left_alone(monkeypatch) -> None:
    """An error of ours in the trial is no reason not to train."""

    def broken(*_: Any, **__: Any) -> mx.array:
        raise ArithmeticError("no tiles today")

    monkeypatch.setattr("grpo.model.attending.attention", broken)
    policy = policy_of("tied")
    assert any(
        "attention keeps its scores" in reason and "the trial failed: ArithmeticError" in reason
        for reason in policy.slow
    )
    assert policy.most_pairs is None
    tokens = mx.array([[1, 2, 3, 4]])
    policy.logprobs(tokens, mx.array([2]), tokens[:, 2:])


class _OwnModel(nn.Module):
    """A model of one's own, in one piece; `cached` if it cannot do without a cache."""

    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.cached, self.layers, self.embed = cached, [nn.Linear(8, 8)], nn.Embedding(16, 8)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        offset = cache[0].offset if self.cached else 0
        return self.embed.as_linear(self.layers[0](self.embed(tokens) + offset))


@pytest.mark.parametrize("cached", [False, True])
def test_a_model_that_needs_a_cache_is_refused_in_a_sentence(cached: bool) -> None:
    model = _OwnModel(cached)
    adapters = Adapters(model, AdapterConfig(type="full"), mx.random.key(0))
    if not cached:
        assert Policy(model, adapters, 0.9).slow
        return
    with pytest.raises(
        UserError,
        match=r"as model\(tokens, cache=None\), and this raises TypeError in .*test_attending\.py:\d+: ",
    ):
        Policy(model, adapters, 0.9)


def test_attention_that_tiles_get_wrong_is_left_alone(monkeypatch) -> None:
    """Found out by trial: prompts are shared all the same."""
    monkeypatch.setattr("grpo.model.promptcaches.attention", lambda queries, *_: mx.ones_like(queries))
    policy = policy_of("tied")
    assert policy.share_prompts
    assert any("attention keeps its scores" in reason for reason in policy.slow)


def test_the_gated_activation_and_its_gradient() -> None:
    gate = mx.concatenate([mx.random.normal((100,), key=mx.random.key(1)) * 8, mx.array([-1e4, 1e4])])
    x, slopes = (mx.random.normal((102,), key=mx.random.key(number)) for number in (2, 3))
    pair: Any = [mx.vjp(f, [gate, x], [slopes]) for f in (swiglu, lambda gate, x: nn.silu(gate) * x)]
    found, expected = ([*out, *gradients] for out, gradients in pair)
    for mine, theirs in zip(found, expected, strict=True):
        assert mx.allclose(mine, theirs, rtol=1e-6, atol=1e-6)
