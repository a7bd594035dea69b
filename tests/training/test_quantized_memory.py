"""An update of an adapter over weights in 4 bits never holds more than a layer of them in float."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import make_model, shaken
from training.sections import make_minibatches, updater
from training.test_optimizer_memory import resting
from training.test_packing import row
from training.test_update import recipe

from grpo.config import AdapterConfig
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.adapters import Adapters
from grpo.model.drawn import NoTokenizer
from grpo.model.policy import Policy
from grpo.types import Group

WIDE = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 32, "vocab_size": 512, "num_hidden_layers": 12}
LAYER = 4 * 256 * (2 * 128 + 2 * 64 + 3 * 768)
"""Bytes of a layer's matrices in float32: a twelfth of all, and a seventh of what all are in 4 bits."""


def quantised(mode: str, **adapter) -> Policy:
    model = make_model("untied", **WIDE)
    nn.quantize(model, mode=mode)
    mx.eval(model.parameters())
    adapters = Adapters(model, AdapterConfig(rank=2, **adapter), mx.random.key(0))
    adapters.load_state(shaken(adapters.state()))
    return Policy(model, adapters, 1.0)


@pytest.mark.quick_cases("adapter0", "adapter1")
@pytest.mark.parametrize(
    ("mode", "checkpointing", "adapter"),  # every pair of them
    [
        ("affine", False, {}),
        ("mxfp4", True, {}),
        ("affine", True, {"type": "dora"}),
        ("mxfp4", False, {"type": "dora"}),
        ("affine", False, {"use_rslora": True}),
        ("mxfp4", True, {"use_rslora": True}),
    ],
)
def test_an_update_makes_no_float_copy_of_the_base(mode: str, checkpointing: bool, adapter: dict) -> None:
    policy = quantised(mode, **adapter)
    cfg = recipe(adapter=adapter, optim={"micro_batch_tokens": 999})
    policy.gradient_checkpointing = checkpointing
    groups = [Group((found := [row(4, 4, number) for _ in range(2)])[0][0], tuple(one for _, one in found))
              for number in range(2)]  # fmt: skip
    update, minibatches = updater(policy, cfg), make_minibatches(groups, cfg)
    update(minibatches, 1)
    before = resting()
    update(minibatches, 2)
    activations = 0 if checkpointing else 3 * LAYER  # of the 24 tokens, in all layers
    assert mx.get_peak_memory() - before < LAYER + activations


@pytest.mark.quick_cases("adapter0")
@pytest.mark.parametrize("adapter", [{}, {"type": "dora"}])
def test_decoding_makes_no_copy_of_the_base(adapter: dict) -> None:
    policy = quantised("affine", **adapter)
    generator = Generator(policy.model, NoTokenizer(), 2)
    before = resting()
    generator.generate([Request([1, 2, 3], 2)], Sampling(max_tokens=4), mx.random.key(0))
    assert mx.get_peak_memory() - before < LAYER


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_put_on_layer_by_layer(kind: str) -> None:
    model = make_model("untied", **WIDE)
    nn.quantize(model)
    mx.eval(model.parameters())
    before = resting()
    Adapters(model, AdapterConfig(type=kind, rank=2), mx.random.key(0))
    assert mx.get_peak_memory() - before < LAYER
