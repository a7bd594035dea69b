"""Heads that compute float32 logits from 16-bit hidden states and weights.

A product of bfloat16 arrays is summed in float32 and then rounded to bfloat16: a logit near 20 is rounded to a multiple
of an eighth. The later softmax in float32 cannot undo this, and the logprob of a token is off by up to 0.08 nats.
MiniMax-M1 (arXiv 2506.13585) and ScaleRL (arXiv 2510.13786) found that this harms reinforcement learning. MLX has no
product of 16-bit arrays with a float32 result, so weights are cast to float32 here, a few rows of the matrix at a time.
A quantized matrix is multiplied directly with float32 states. The hidden states are unchanged.

The module that projects to the vocabulary is changed in place, so all decoders and training use the same head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.device import on_gpu
from grpo.model.head import talking
from grpo.model.quantized import AFFINE, TypedEmbedding

CHUNK = 2**24
"""Numbers of the matrix that are cast to float32 at a time: 64 MB."""
HELD, HELD_ON_CPU = 4, 20
"""Most pieces in memory at the same time. On a CPU, MLX allocates operations long before it runs them (measured: 18
pieces). A GPU's batches of operations are smaller than a piece (estimated: the previous piece, this piece, the next,
and a spare)."""

TRIED_ROWS = (32, 64, 16)
"""Numbers of rows for the trial of a quantized head. MLX has a separate kernel for each; the first is known to fail."""


def _pieces(weight: mx.array) -> Iterator[slice]:
    rows = max(1, CHUNK // weight.shape[1])
    return (slice(start, start + rows) for start in range(0, weight.shape[0], rows))


@mx.custom_function
def float32_product(x: mx.array, weight: mx.array) -> mx.array:
    """x `[N, D]` times the transpose of weight `[V, D]`, 16-bit or float32: `[N, V]` float32.

    Products and sums are float32, in the gradients too, which are rounded to their arrays' dtypes at the end. `CHUNK`
    numbers of the weight are copied at a time.
    """
    states = x.astype(mx.float32)
    parts: list[mx.array] = []
    for piece in _pieces(weight):  # each piece waits for the previous one, or MLX would copy all together
        rows = mx.depends(weight[piece], parts[-1:]) if parts else weight[piece]
        parts.append(states @ rows.astype(mx.float32).T)
    return mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


@float32_product.vjp
def _gradients(primals: tuple[mx.array, mx.array], slopes: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, weight = primals
    states = x.astype(mx.float32)
    to_states = mx.zeros(x.shape)
    to_weight: list[mx.array] = []
    for piece in _pieces(weight):
        rows = mx.depends(weight[piece], [to_states])
        to_states = to_states + slopes[:, piece] @ rows.astype(mx.float32)
        own = mx.depends(slopes[:, piece], to_weight[-1:]) if to_weight else slopes[:, piece]
        to_weight.append((own.T @ states).astype(weight.dtype))
    return to_states.astype(x.dtype), mx.concatenate(to_weight)


def _project(x: mx.array, weight: mx.array) -> mx.array:
    """`float32_product` for x `[..., D]`: `[..., V]`."""
    flat: Any = float32_product(x.reshape(-1, x.shape[-1]), weight)
    logits: mx.array = flat.reshape(*x.shape[:-1], weight.shape[0])
    return logits


def _quantized_project(module: Any, x: mx.array) -> mx.array:
    logits: mx.array = mx.quantized_matmul(
        x.astype(mx.float32), module["weight"], scales=module["scales"], biases=module.get("biases"), transpose=True,
        group_size=module.group_size, bits=module.bits, mode=module.mode,
    )  # fmt: skip
    return logits


class WideLinear(nn.Linear):  # type: ignore[misc]  # untyped
    """A linear layer with a float32 result."""

    def __call__(self, x: mx.array) -> mx.array:
        y = _project(x, self["weight"])
        return y + self["bias"] if "bias" in self else y


class WideQuantizedLinear(nn.QuantizedLinear):  # type: ignore[misc]
    """A quantized linear layer with a float32 result."""

    def __call__(self, x: mx.array) -> mx.array:
        y = _quantized_project(self, x)
        return y + self["bias"] if "bias" in self else y


class WideEmbedding(nn.Embedding):  # type: ignore[misc]
    """An embedding that is also the head, with a float32 result as the head."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _project(x, self["weight"])


class WideQuantizedEmbedding(nn.QuantizedEmbedding):  # type: ignore[misc]
    """A quantized embedding that is also the head, with a float32 result as the head."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _quantized_project(self, x)


class WideTypedEmbedding(WideQuantizedEmbedding, TypedEmbedding):
    """`WideQuantizedEmbedding` for small floating-point formats."""


WIDE: dict[type, type] = {
    nn.Linear: WideLinear,
    nn.QuantizedLinear: WideQuantizedLinear,
    nn.Embedding: WideEmbedding,
    nn.QuantizedEmbedding: WideQuantizedEmbedding,
    TypedEmbedding: WideTypedEmbedding,
}


HEADS = (nn.Linear, nn.QuantizedLinear)
"""Classes of heads outside the body. The other classes of `WIDE` are embeddings inside it."""


def widen_head(model: nn.Module) -> bool:
    """Make the head of a 16-bit model compute float32 logits. Returns whether that worked.

    Evaluates nothing, except for the trial of a quantized head on a GPU.

    A trial finds the head: the linear layer outside the body, or the embedding, that determines the logits' dtype.
    """
    if _logits_dtype(model) == mx.float32:
        return False
    outer = talking(model)
    linear = [module for module in outer.children().values() if type(module) in HEADS]
    embeddings = [module for module in model.modules() if type(module) in WIDE and type(module) not in HEADS]
    for module in (*linear, *embeddings):
        narrow = type(module)
        module.__class__ = WIDE[narrow]  # in place: other references to this module get the new head, too
        if _logits_dtype(model) == mx.float32 and _multiplies(module):
            return True
        module.__class__ = narrow
    return False


def _multiplies(module: Any) -> bool:
    """Whether this machine can compute with a widened head.

    Tried on a GPU, because on an H200 MLX 0.32 failed to compile its quantized product of float32 states for some
    numbers of rows.
    """
    if "scales" not in module or not on_gpu():
        return True
    width = module["scales"].shape[-1] * module.group_size
    try:
        for rows in TRIED_ROWS:
            mx.eval(_quantized_project(module, mx.zeros((rows, width))))
    except RuntimeError:
        return False
    return True


def wide_head(model: nn.Module) -> nn.Module | None:
    """The widened module, or None."""
    return next((module for module in model.modules() if type(module) in WIDE.values()), None)


def bytes_at_work(model: nn.Module, gpu: bool) -> int:
    """Bytes that a widened head needs in addition to its logits: float32 pieces of its matrix, or a quantized matrix's
    float32 scales."""
    head = wide_head(model)
    if head is None:
        return 0
    if "scales" in head:
        copied = [head[name] for name in ("scales", "biases") if head.get(name) is not None and head.mode == AFFINE]
        return sum(4 * int(array.size) for array in copied)
    numbers: int = head["weight"].size
    return 4 * min(numbers, (HELD if gpu else HELD_ON_CPU) * CHUNK)


def _logits_dtype(model: nn.Module) -> mx.Dtype:
    dtype: mx.Dtype = model(mx.array([[0, 1]])).dtype  # nothing is evaluated
    return dtype
