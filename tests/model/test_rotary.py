"""Rotary embeddings in stock operations turn as MLX's own do."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import make_model

from grpo.model.lines import by_token
from grpo.model.rotary import FewTurned, turn_by_stock_operations


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("offset", [0, 7, mx.array(5), mx.array([3, 0, 900])])
def test_they_turn_as_mlx_does(offset, traditional: bool, dtype: mx.Dtype) -> None:
    theirs = nn.RoPE(12, traditional=traditional, base=1e4, scale=0.5)
    ours = nn.Sequential(nn.RoPE(12, traditional=traditional, base=1e4, scale=0.5))
    turn_by_stock_operations(ours)
    assert type(ours.layers[0]) is FewTurned
    for shape in ((3, 4, 6, 16), (3, 6, 12)):  # a part of the head stays; a shape without heads
        x = mx.random.normal(shape, key=mx.random.key(1)).astype(dtype)
        found, wanted = ours.layers[0](x, offset=offset), theirs(x.astype(mx.float32), offset=offset)
        assert found.dtype == dtype
        assert mx.allclose(found, wanted, rtol=0, atol=3e-6 if dtype == mx.float32 else 2e-2)


def test_a_model_computes_the_same_and_its_tokens_may_have_positions_of_their_own() -> None:
    model, tokens = make_model("tied", hidden_size=64, num_attention_heads=4), mx.array([[3, 1, 4, 1, 5]])
    wanted = model(tokens)
    turn_by_stock_operations(model)
    kinds = [type(module) for module in model.modules() if isinstance(module, nn.RoPE)]
    assert kinds
    assert set(kinds) == {FewTurned}
    assert mx.allclose(model(tokens), wanted, atol=1e-5)
    with by_token(model):
        rope = next(module for module in model.modules() if isinstance(module, FewTurned))
        x = mx.random.normal((1, 2, 5, 16))
        assert mx.allclose(rope(x, mx.array([[0, 1, 2, 3, 4]])), rope(x, 0), atol=1e-6)


def test_wider_ones_stay_as_they_are() -> None:
    wide = nn.Sequential(nn.RoPE(32))
    turn_by_stock_operations(wide)
    assert type(wide.layers[0]) is nn.RoPE
