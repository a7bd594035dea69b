"""A second model's forward pass: reckoned near what is measured, and the larger of it and the update counts."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import make_model

from grpo.config import TeacherConfig
from grpo.model.adapters import NoAdapters
from grpo.model.outline import costs_of
from grpo.model.policy import Policy
from grpo.planning.activations import forward_footprint
from grpo.planning.footprint import Footprint, _going_through
from grpo.planning.lesson import TeacherNeeds
from grpo.training.packing import Shape


def wide(**changes):
    model = make_model("untied", hidden_size=128, intermediate_size=768, **changes)
    model.freeze()
    return model


def peak(policy: Policy, shape: Shape) -> int:
    """Bytes that the hidden states of a micro-batch of this shape take at most."""
    given, hidden = _going_through(policy, shape)
    mx.eval(given, policy.model.parameters())
    for _ in range(2):  # constants that are made once
        resting = mx.get_active_memory()
        mx.reset_peak_memory()
        found = hidden(*given)
        mx.eval(found)
        del found
    return mx.get_peak_memory() - resting


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("shape", [Shape(2, 32, 16, 32), Shape(1, 16, 1, 400)])
def test_a_forward_pass_takes_about_what_is_reckoned(layers: int, shape: Shape) -> None:
    model = wide(num_hidden_layers=layers)
    reckoned = replace(forward_footprint(costs_of(model), fused=False, gpu=False), logits=0)
    assert reckoned.bytes(shape) == pytest.approx(peak(Policy(model, NoAdapters(model), 1.0), shape), rel=0.3)


@pytest.mark.parametrize("kl", ["sampled", "exact", "top_k"])
def test_the_larger_of_a_second_models_pass_and_the_update_counts(kl: str) -> None:
    cfg, shape = TeacherConfig(model="m", kl=kl), Shape(2, 32, 16, 32)
    lesson = TeacherNeeds.of(cfg, make_model("tied"), wide(), gpu=False)
    assert lesson.asking is not None
    small, large = Footprint(0, 1.0, 0.0, 512, 32, True, True), Footprint(0, 1e6, 0.0, 512, 32, True, True)
    asked = lesson.asking.in_chunks(2**12).bytes(shape)
    assert lesson.beside(small).in_chunks(2**12).bytes(shape) == asked > small.bytes(shape)
    assert lesson.beside(large).bytes(shape) == large.bytes(shape) > asked
    fused = TeacherNeeds.of(cfg, make_model("tied"), wide(), gpu=True, fused=True).asking
    assert fused is not None
    assert fused.bytes(shape, body=None) < lesson.asking.bytes(shape) + 1
    by_adapter = TeacherNeeds.of(TeacherConfig(adapter="a", kl=kl), make_model("tied"))
    assert by_adapter.asking is None
    assert by_adapter.weights == 0
