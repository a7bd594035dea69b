"""How many kernels a CUDA machine builds before its first update is made: each takes seconds there.

The graphs are the same on a CPU, where they are looked at here and not computed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from training.sections import make_batches, updater, with_advantages
from training.test_update import groups, recipe

from grpo.backend import device, maths
from grpo.model import attending
from grpo.model.policy import Policy
from grpo.training import packing
from grpo.types import Batch

KERNELS = {"dapo": 8, "cispo": 8, "grpo": 10, "gspo": 10}
"""Of a micro-batch's gradient, at most: the activation, forward and backward; the head, forward and backward; sums of
gradients; and the objective, which a penalty or a ratio of whole sequences divides. Lines need a mask more."""
BUILT = {"GatherAxis", "Scatter", "ScatterAxis"}
"""MLX builds a kernel for each of these by the arrays' dtypes. Gather is another, for three pairs of dtypes."""


def opaque(x: mx.array, *_: Any, **__: Any) -> mx.array:
    """In the place of an operation that is a kernel of its own on a GPU, forward and backward."""

    @mx.custom_function
    def call(x: mx.array) -> mx.array:
        return mx.sort(x, axis=-1)

    @call.vjp
    def back(_x: mx.array, slopes: mx.array, _: mx.array) -> mx.array:
        return mx.sort(slopes, axis=-1)

    return call(x)


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **_: Any) -> mx.array:
    @mx.custom_function
    def call(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.sort(q, axis=-1)

    @call.vjp
    def back(primals: list[mx.array], slopes: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        return tuple(mx.sort(array, axis=-1) for array in (slopes, *primals[1:]))

    out = call(q, k, v)
    return mx.depends([out], [mask])[0] if isinstance(mask, mx.array) else out


@pytest.fixture
def on_a_gpu(make_policy, monkeypatch) -> Iterator[Policy]:
    """A policy in bfloat16, whose update is compiled as for a GPU."""
    policy = make_policy().policy
    policy.model.update(tree_map(lambda array: array.astype(mx.bfloat16), policy.model.parameters()))
    assert policy.packs
    for module in (device, maths, packing):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(packing, "GPU_MULTIPLE", 8)
    monkeypatch.setattr(mx.fast, "rms_norm", opaque)
    monkeypatch.setattr(mx.fast, "rope", opaque)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(attending, "fused", lambda *_: True)  # as on CUDA, for which kernels are counted
    mx.enable_compile()
    yield policy
    mx.disable_compile()


def operations(outputs: Any) -> set[str]:
    """The names of all operations that lead to these arrays. A fused kernel's begins with Compiled."""
    written = io.StringIO()
    mx.export_to_dot(written, *outputs)
    return set(re.findall(r'label ?= ?"(\w+)"', written.getvalue()))


def fused(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("Compiled")}


def traced(policy: Policy, batch: Batch, cfg: Any) -> set[str]:
    tree = tree_map(lambda p: mx.zeros(p.shape), policy.model.trainable_parameters())
    return operations(updater(policy, cfg).gradients._accumulate(tree, batch.arrays(), None))


@pytest.mark.each_value
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("kind", KERNELS)
def test_an_updates_gradient_needs_few_kernels(on_a_gpu: Policy, lines: bool, kind: str, stale: bool) -> None:
    penalty = 0.1 if kind == "grpo" else 0.0
    optim = {"micro_batch_tokens": 200, "pack_completions": lines}
    cfg = recipe(optim=optim, loss={"type": kind, "beta": penalty})
    mx.disable_compile()
    batch = make_batches(with_advantages(groups(on_a_gpu), cfg), cfg)[0]
    batch = replace(batch, reference=batch.behaviour if penalty else None)
    batch = replace(batch, stale=batch.trained if stale else None)
    mx.enable_compile()
    assert (batch.lines is not None) == lines
    names = traced(on_a_gpu, batch, cfg)
    assert 3 < len(fused(names)) <= KERNELS[kind] + lines + stale
    assert not names & BUILT


def test_an_optimizers_step_needs_one_kernel(on_a_gpu: Policy) -> None:
    optimizer = updater(on_a_gpu, recipe()).optimizer
    shared = {"step": mx.array(0, mx.uint64), "learning_rate": mx.array(1e-3)}
    shared |= optimizer._optimizer.factors(shared)
    mx.eval(shared)
    arrays = [mx.ones((4, 3)), mx.ones((5,))]
    own = [{"m": mx.zeros(array.shape), "v": mx.zeros(array.shape)} for array in arrays]
    old = [array.astype(mx.bfloat16) for array in arrays]
    moved, rounded, state = optimizer._step(arrays, mx.array(0.5), arrays, old, {**shared, "own": own})
    flat = [array for moments in state["own"] for array in moments.values()]
    assert len(fused(operations([*moved, *rounded, *flat, state["step"]]))) == 1
