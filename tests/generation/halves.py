"""The arithmetic of the CUDA kernels by stock operations, in their places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import pytest

from grpo.generation import decoders
from grpo.generation.attention import StockAttention
from grpo.generation.blocks import Block, Blocks, Norm
from grpo.generation.buffers import Layer
from grpo.generation.cuda_attention import CudaAttention
from grpo.generation.joined import Half
from grpo.generation.slots import View


class StockKernels(CudaAttention):
    """What the attention kernel computes."""

    overlaps = False  # nothing is written behind MLX's back

    def attend_half(self, layer: Layer, qkv: Half, block: Block, blocks: Blocks, view: View) -> mx.array:
        return StockAttention().attend_joined(layer, qkv.whole(block.qkv.outs), block, blocks, view)


def add_and_norm(hidden: mx.array, half: Half, norm: Norm) -> tuple[mx.array, mx.array]:
    added = hidden + half.whole((hidden.shape[1],))
    return added, norm(added)


def gated(half: Half, width: int) -> mx.array:
    gate, up = mx.split(half.whole((width, width)), 2, axis=-1)
    return nn.silu(gate) * up


@contextmanager
def stock_kernels() -> Iterator[None]:
    """Inside the block a new `BlockDecoder` works as it does on CUDA, by stock operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoders, "available", lambda: True)
        patch.setattr(decoders, "add_and_norm", add_and_norm)
        patch.setattr(decoders, "gated", gated)
        yield
