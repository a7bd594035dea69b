"""Decode attention as CUDA kernels.

MLX writes into a buffer only if no step in flight holds it, so a pipelined loop of stock operations copies all keys and
values at every step. These kernels instead write new keys and values into their columns in place, which MLX does not
know: no other code may write these buffers while a step is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from grpo.backend.cuda import available, constant, kernel, power_of_two
from grpo.backend.maths import largest_power_of_two
from grpo.generation.blocks import Block, Blocks
from grpo.generation.buffers import CacheShape, Layer
from grpo.generation.cuda_queries import BEGIN, JOINED, PREPARED, ROWS
from grpo.generation.cuda_sources import ALONE, HEADER, PLAIN, PLAIN_BEGIN, TENSOR, TENSOR_BEGIN, TOGETHER
from grpo.generation.joined import Half
from grpo.generation.slots import WIDEST, View, Where

WARPS = 4
"""Warps per block that uses tensor cores."""
PLAIN_WARPS = 8
"""Warps per block that computes in fp32."""
MOST_QUERIES = 16
"""Limit on query heads times positions per block, for heads of up to 128 numbers; half of it for wider heads."""
MOST_TOGETHER = 8
"""Limit on query heads times positions times rows of one prompt per block."""
BLOCKS = 528
"""Number of blocks that fill a device. With fewer blocks, several blocks share the columns of a row."""
MOST_SPLITS = 16
"""Limit on the number of blocks that share the columns of a row."""
WIDTHS = (32, 64, 128, 256)
"""Head widths that a warp can read as vectors."""
MOST_REPEATS = 8
"""Largest number of query heads per key head that fits a block's registers."""
SHARED_BYTES = 48 * 1024
"""Bytes of shared memory that a block may declare."""


class CudaAttention:
    """See `grpo.generation.attention.Attention`."""

    overlaps, widest = True, WIDEST

    def __init__(self) -> None:
        self._counters: dict[int, mx.array] = {}
        self._placed: tuple[Where, tuple[int, int], tuple[mx.array, mx.array]] | None = None

    def attend(
        self, layer: Layer, queries: mx.array, keys: mx.array, values: mx.array, scale: float, view: View | Where
    ) -> mx.array:
        rows, query_heads, wide, width = queries.shape
        inputs = {"queries": queries, "keys": keys, "values": values}
        out = self._run(
            "grpo_attend",
            constant("SCALE", scale),
            PREPARED,
            inputs,
            [],
            layer,
            view,
            (rows, wide, query_heads, keys.shape[1], width),
        )
        return out.reshape(rows, wide, query_heads, width).swapaxes(1, 2)

    def attend_joined(self, layer: Layer, qkv: mx.array, block: Block, blocks: Blocks, view: View | Where) -> mx.array:
        return self.attend_half(layer, Half(qkv, qkv, 0, qkv, (0, 0, 0), None), block, blocks, view)

    def attend_half(self, layer: Layer, qkv: Half, block: Block, blocks: Blocks, view: View | Where) -> mx.array:
        """Attention from a block's joined product; the kernel also applies the adapters' B: `[S · W, HQ · D]`."""
        norm, rows = block.qk_norm, view.where.place_of.shape[0]
        inputs = {
            **half_inputs(qkv),
            "weight": norm.weight if norm else blocks.norm.weight,
            "frequencies": blocks.frequencies,
        }
        constants = constant("SCALE", blocks.scale) + constant("EPS", norm.eps if norm else 0.0)
        ranks = zip(("RQ", "RK", "RV"), qkv.ranks, strict=True)
        template = [*half_template(qkv), *ranks, ("NORM", norm is not None), ("TRADITIONAL", blocks.traditional)]
        sizes = rows, qkv.base.shape[0] // rows, blocks.query_heads, blocks.heads, blocks.width
        return self._run("grpo_attend_joined", constants, JOINED, inputs, template, layer, view, sizes)

    def _run(
        self,
        name: str,
        constants: str,
        prepare: str,
        inputs: dict[str, mx.array],
        template: list[tuple[str, Any]],
        layer: Layer,
        view: View | Where,
        sizes: tuple[int, int, int, int, int],
    ) -> mx.array:
        """Run a kernel. `sizes`: rows, positions per row, query heads, key heads, and the width of a head."""
        rows, wide, query_heads, heads, width = sizes
        dtype, repeats = layer.keys.dtype, query_heads // heads
        tensor = dtype != mx.float32 and width % 64 == 0
        positions = min(wide, max(1, (MOST_QUERIES if width <= 128 else MOST_QUERIES // 2) // repeats)) if tensor else 1
        together = max(1, MOST_TOGETHER // (positions * repeats)) if tensor and positions == wide else 1
        placed, tiles = self._rows(view.where, layer, wide, together)
        groups = (len(tiles) if together > 1 else rows) * heads * -(-wide // positions)
        full = -(-rows // together) * heads * -(-wide // positions)  # the number of groups if all tiles are full
        splits = min(MOST_SPLITS, largest_power_of_two(BLOCKS // full)) if tensor and full <= BLOCKS else 1
        warps = WARPS if tensor else PLAIN_WARPS
        names = ("prefix_keys", "prefix_values", "own_keys", "own_values")
        buffers = dict(zip(names, layer.arrays(), strict=True))
        inputs = {**inputs, **buffers, "rows": placed, "tiles": tiles}
        outputs, shapes, dtypes = ["out"], [(rows * wide, query_heads * width)], [dtype]
        if splits > 1:
            inputs["arrived"] = self._counter(groups)
            outputs += ["parts", "marks"]
            shapes += [(groups * splits, together * repeats * positions * width)]
            shapes += [(groups * splits, together * repeats * positions * 2)]
            dtypes += [mx.float32, mx.float32]
        body = TENSOR_BEGIN + prepare + TENSOR if tensor else PLAIN_BEGIN + prepare + PLAIN
        source = constants + BEGIN + body
        if tensor:
            source += TOGETHER if splits > 1 else ALONE
        out: mx.array = kernel(name, tuple(inputs), tuple(outputs), source, HEADER if tensor else "")(
            inputs=list(inputs.values()),
            template=[
                *template, ("T", dtype), ("D", width), ("HK", heads), ("REPEATS", repeats), ("WIDE", wide),
                ("POSITIONS", positions), ("TOGETHER", together), ("SPLITS", splits), ("WARPS", warps),
            ],
            grid=(groups * splits * warps * 32, 1, 1),
            threadgroup=(warps * 32, 1, 1),
            output_shapes=shapes,
            output_dtypes=dtypes,
        )[0]  # fmt: skip
        return out

    def _rows(self, where: Where, layer: Layer, wide: int, together: int) -> tuple[mx.array, mx.array]:
        """The place, prompt length and column of each row at this step, `[S, 4]` int32, and tiles of rows that share a
        prompt, `[n, together]` int32. Both are computed once per step for all layers."""
        if self._placed is None or self._placed[0] is not where or self._placed[1] != (wide, together):
            inputs = {**where._asdict(), "own_keys": layer.keys}
            rows, places = where.place_of.shape[0], where.lengths.shape[0]
            tiles = rows // together + min(rows, places)  # each prompt may have one tile that is not full
            made = kernel("grpo_rows", tuple(inputs), ("rows", "tiles"), ROWS)(
                inputs=list(inputs.values()),
                template=[
                    ("WIDE", wide), ("TOGETHER", together), ("MOST", power_of_two(max(64, rows, places))),
                ],
                grid=(256, 1, 1),
                threadgroup=(256, 1, 1),
                output_shapes=[(rows, 4), (tiles, together)],
                output_dtypes=[mx.int32, mx.int32],
            )  # fmt: skip
            self._placed = where, (wide, together), (made[0], made[1])
        return self._placed[2]

    def _counter(self, groups: int) -> mx.array:
        """A counter per group of blocks that share columns, at zero. The blocks leave it at zero."""
        if groups not in self._counters:
            self._counters[groups] = mx.zeros(groups, mx.int32)
            mx.eval(self._counters[groups])
        return self._counters[groups]


def half_inputs(half: Half) -> dict[str, mx.array]:
    """The inputs of kernels that apply the adapters' B."""
    bias = half.b if half.bias is None else half.bias
    return {"product": half.base, "low": half.low, "b": half.b, "bias": bias}


def half_template(half: Half) -> list[tuple[str, Any]]:
    return [("LOW", half.first), ("BIAS", half.bias is not None)]


def serves(shapes: Sequence[CacheShape], query_heads: int) -> bool:
    """Whether there is a CUDA device, and the kernels support caches of these shapes."""
    return available() and all(
        shape.key_width == shape.value_width
        and shape.key_width in WIDTHS
        and query_heads // shape.heads <= MOST_REPEATS
        and _shared_bytes(query_heads // shape.heads, shape.key_width) <= SHARED_BYTES
        for shape in shapes
    )


def _shared_bytes(repeats: int, width: int) -> int:
    """Bytes of `query`, `staged`, `totals`, `highests` and `weights` in a block that computes in fp32."""
    return 4 * (repeats * width + PLAIN_WARPS * width + PLAIN_WARPS * repeats * width + 2 * PLAIN_WARPS * repeats)
