"""Some layers checkpointed, by number: the same gradient, with dropout, shared prompts and completions in lines."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import make_model
from mlx.utils import tree_flatten
from model.test_attending import lines_logprobs, rows_logprobs

from grpo.config import AdapterConfig
from grpo.model.adapters import Adapters
from grpo.model.dropout import dropping
from grpo.model.policy import Policy


@pytest.fixture(scope="module", params=[{"rank": 4, "dropout": 0.2}, {"rank": 4, "type": "dora"}, {"type": "full"}])
def policy(request: pytest.FixtureRequest) -> Policy:
    model = make_model("tied", num_hidden_layers=3)
    return Policy(model, Adapters(model, AdapterConfig(**request.param), mx.random.key(0)), 0.9)


def gradient(policy: Policy, logprobs: Callable[[Policy], mx.array]) -> dict[str, mx.array]:
    def loss(_: nn.Module) -> mx.array:
        with dropping(mx.random.key(5)):
            return logprobs(policy).sum()

    with policy.training():
        found = dict(tree_flatten(nn.value_and_grad(policy.model, loss)(policy.model)[1]))
    mx.eval(found)
    return found


@pytest.mark.each_value
@pytest.mark.parametrize("layers", [1, 2, 9])
@pytest.mark.parametrize("logprobs", [rows_logprobs, lines_logprobs])
def test_the_gradient_is_the_same(policy: Policy, layers: int, logprobs: Callable[[Policy], mx.array]) -> None:
    assert policy.packs
    policy.gradient_checkpointing = False
    expected = gradient(policy, logprobs)
    policy.gradient_checkpointing = layers
    found = gradient(policy, logprobs)
    assert found.keys() == expected.keys()
    largest = max(mx.abs(array).max().item() for array in expected.values())
    for path, array in expected.items():
        assert mx.abs(found[path] - array).max().item() < 1e-5 * largest
