"""What a checkpointed layer computes in tiles of tokens counts for two tiles, not for every token."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import make_model

from grpo.config import AdapterConfig
from grpo.model import rowwise
from grpo.model.adapters import Adapters
from grpo.model.drawn import config_of
from grpo.model.outline import costs_of, costs_of_config
from grpo.model.policy import Policy
from grpo.model.rowwise import RowWise
from grpo.planning.activations import reckoned_footprint
from grpo.planning.footprint import Footprint, measure_body
from grpo.training.packing import Shape

INNER = {"intermediate_size": 768, "moe_intermediate_size": 384}
"""A feed-forward part as wide as this takes most of a layer's memory."""


def wide(kind: str):
    inner = {name: size for name, size in INNER.items() if kind == "moe" or "moe" not in name}
    return make_model(kind, **inner, num_hidden_layers=2)


@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_the_inside_counts_for_as_many_tokens_as_two_tiles_have(monkeypatch, kind: str) -> None:
    model = wide(kind)
    for blocks in (1, 3):
        monkeypatch.setitem(rowwise.NUMBERS, False, blocks * 256 * 2000)
        parts = RowWise(model)._parts.values()
        (tile,) = {size for layer in parts for _, size in layer}
        footprint = reckoned_footprint(costs_of(model), True, fused=False, gpu=False)
        assert footprint.most_inside == 2 * tile


def test_many_tokens_in_tiles_take_about_what_is_reckoned(monkeypatch) -> None:
    monkeypatch.setitem(rowwise.NUMBERS, False, 256 * 2000)
    monkeypatch.setitem(rowwise.NUMBERS, True, 256 * 2000)
    model = wide("tied")
    policy = Policy(model, Adapters(model, AdapterConfig(rank=8), mx.random.key(0)), 1.0)
    found = reckoned_footprint(costs_of(model), True, fused=True, gpu=False)  # scores come later
    reckoned = replace(found, fixed=0, logits=0, head=0)
    shape = Shape(1, 16, 8, 256)
    (peak,) = measure_body(policy, True, [shape])
    assert reckoned.bytes(shape) == pytest.approx(peak, rel=0.35)
    assert replace(reckoned, most_inside=10**9).bytes(shape) > 1.7 * peak  # if all tokens counted


def test_the_inside_counts_for_so_many_tokens_at_most() -> None:
    footprint = Footprint(0, 10.0, 0.0, 0, 1, True, True, inside=30.0, most_inside=100)
    assert [footprint.bytes(Shape(1, 50, 1, length)) for length in (10, 50, 150)] == [60 * 40, 100 * 40, 2_000 + 3_000]


def test_tiles_do_not_make_less_of_what_waits_for_the_loss() -> None:
    """Layers' inputs: a third of 12 bytes for each of 600 tokens, and no more than was seen."""
    footprint = Footprint(0, 10.0, 0.0, 400, 250, True, True, inside=2.0, most_inside=10)
    shape, logits = Shape(1, 500, 1, 100), 4 * 400 * 100
    assert footprint.bytes(shape) == 2_400 + logits
    assert footprint.bytes(shape, 3_000) == 2_400 + logits
    assert footprint.bytes(shape, 1_500) == 1_500 + logits


def test_long_rows_of_a_large_model_need_a_third_less() -> None:
    """8 B parameters: of the inside of the feed-forward part 4,608 tokens are there, whatever the length."""
    costs = costs_of_config(config_of("qwen3-8b"), AdapterConfig(rank=16))
    footprint = reckoned_footprint(costs, True, fused=True)
    assert footprint.most_inside == 4608
    assert footprint.inside / (footprint.token + footprint.inside) == pytest.approx(0.35, abs=0.1)
    assert reckoned_footprint(costs, False, fused=True).inside == 0
