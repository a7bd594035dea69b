"""Tensor parallel: one model in several processes, each of which holds a part of every large matrix (arXiv 1909.08053).

mlx-lm divides the model (`Model.shard`). A layer by column holds some of the outputs, and sums the gradient of its
input over the processes; a layer by row holds some of the inputs, and sums its outputs. Between the two nothing is
exchanged.
Here these layers are linear layers as all others are, so that adapters, quantisation and decoding read them as such.
An adapter goes with the layer below it: by column A `[in, r]` is whole and B `[r, out / n]` is divided, by row A
`[in / n, r]` is divided and B `[r, out]` is whole. What is whole is the same in all processes; its gradient is a sum.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers import distributed

from grpo.backend.hub import one_line
from grpo.backend.ranks import Ranks
from grpo.errors import UserError
from grpo.model.mlxlm import QuantizedSwitchLinear, SwitchLinear

Processes = mx.distributed.Group
TRAINED = "glm4_moe", "gpt_oss", "llama", "ministral3", "qwen2", "qwen3", "qwen3_moe"
"""The architectures whose gradients were found to be right when they are divided. Of MiniMax's, whose norms are of all
heads together, they are not, and in latent attention the gradient of what is whole comes out in parts."""
HEADS = ("num_attention_heads", "num_key_value_heads")
LINEAR = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)

_SILENT: ContextVar[bool] = ContextVar("whether nothing is exchanged", default=False)


def scattered(x: mx.array, group: Processes) -> mx.array:
    """`x` itself, whose gradient is summed over the group: each process finds the part that comes through its own."""
    return distributed.sum_gradients(group)(x) if _speaks(group) else x


def summed(x: mx.array, group: Processes) -> mx.array:
    """The sum of `x` over the group. Each process has the whole gradient of it already."""
    return mx.distributed.all_sum(x, group=group) if _speaks(group) else x


def _speaks(group: Any) -> bool:
    """Whether anything is exchanged: not inside `silent`, nor in the outline of a model of which no process is here."""
    return isinstance(group, Processes) and not _SILENT.get()


class ByColumn:
    """Put before a linear layer's class: the layer of some of the outputs."""

    group: Processes

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., in]`, the same in all processes, to `[..., out / n]`."""
        out: mx.array = super().__call__(scattered(x, self.group))  # type: ignore[misc]  # the layer's own
        return out


class ByRow:
    """Put before a linear layer's class: the layer of some of the inputs. The first process alone has the bias, the
    others have zeros."""

    group: Processes

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., in / n]` to `[..., out]`, the same in all processes."""
        return summed(super().__call__(x), self.group)  # type: ignore[misc]  # the layer's own


class ColumnLinear(ByColumn, nn.Linear):  # type: ignore[misc]  # untyped
    """A `nn.Linear` by column."""


class RowLinear(ByRow, nn.Linear):  # type: ignore[misc]  # untyped
    """A `nn.Linear` by row."""


class QuantizedColumnLinear(ByColumn, nn.QuantizedLinear):  # type: ignore[misc]  # untyped
    """A `nn.QuantizedLinear` by column."""


class QuantizedRowLinear(ByRow, nn.QuantizedLinear):  # type: ignore[misc]  # untyped
    """A `nn.QuantizedLinear` by row."""


OURS: Mapping[type, type] = {
    distributed.AllToShardedLinear: ColumnLinear,
    distributed.ShardedToAllLinear: RowLinear,
    distributed.QuantizedAllToShardedLinear: QuantizedColumnLinear,
    distributed.QuantizedShardedToAllLinear: QuantizedRowLinear,
}
"""What takes the place of MLX's divided layers, by their classes."""


def divide(model: nn.Module, ranks: Ranks) -> None:
    """Leave of `model` (in place) what this process holds where `ranks` hold it together. Nothing is computed.

    Raises UserError for an architecture that mlx-lm does not divide, or not among so many.
    """
    if ranks.size == 1:
        return
    _check_divides(model, ranks.size)
    shapes = {path: module.weight.shape for path, module in model.named_modules() if isinstance(module, LINEAR)}
    try:
        model.shard(ranks.group)
    except Exception as error:  # whatever mlx-lm's or MLX's own code raises
        raise UserError(
            f"model.shard: tensor: mlx-lm cannot divide this model among {ranks.size} processes: {one_line(error)}"
        ) from error
    for path, module in model.named_modules():
        if type(module) in OURS:
            _become_linear(module, OURS[type(module)], ranks)
        if isinstance(module, LINEAR) and (axis := _cut(shapes[path], module, ranks.size)) is not None:
            module.cut = axis
    if not isinstance(ranks.group, Processes):
        for block, _ in _speaking(model):
            block.sharding_group = None
    _count_own_heads(model, ranks.size)


def cut_of(layer: nn.Module) -> int | None:
    """Along which axis a linear layer's matrix, or that below an adapter's layer, is divided: -2 for outputs, -1 for
    inputs; None where it is whole."""
    cut: int | None = getattr(layer.linear if "lora_a" in layer else layer, "cut", None)
    return cut


def hand_over(layer: nn.Module, by_column: type, by_row: type) -> None:
    """Let an adapter's layer exchange what a divided layer below it does, which is an undivided one's like from now
    on: so one sum serves both. An adapter's layer over any other stays as it is."""
    base = layer.linear
    if isinstance(base, ByColumn | ByRow):
        layer.__class__ = by_column if isinstance(base, ByColumn) else by_row
        layer.group = base.group
        base.__class__ = nn.Linear if isinstance(base, nn.Linear) else nn.QuantizedLinear


def _check_divides(model: nn.Module, size: int) -> None:
    architecture = type(model).__module__.rpartition(".")[2]
    if architecture not in TRAINED:
        why = (
            "mlx-lm divides it to sample from it, and its gradients are not known to be right then"
            if hasattr(model, "shard")
            else "mlx-lm does not divide it"
        )
        raise UserError(
            f"model.shard: tensor: the architecture {architecture}: {why}. Divided models that train are "
            f"{', '.join(TRAINED)}. Leave model.shard out"
        )
    for name in HEADS:
        heads = getattr(model.args, name, None)
        if heads is not None and heads % size:
            raise UserError(
                f"model.shard: tensor: {size} processes cannot share {heads} heads ({name}) evenly: set "
                f"model.shard_size to a divisor of {heads}"
            )


def _become_linear(module: nn.Module, kind: type, ranks: Ranks) -> None:
    module.__class__ = kind
    if issubclass(kind, ByRow) and "bias" in module and ranks.rank:
        module.bias = mx.zeros_like(module.bias)


def _cut(whole: tuple[int, ...], module: Any, size: int) -> int | None:
    """Along which axis of its matrix a layer is divided: -2 for outputs, -1 for inputs; None where it is whole."""
    mine = module.weight.shape
    if mine == whole:
        return None
    cut = [axis for axis in (-2, -1) if mine[axis] * size == whole[axis]]
    if len(cut) != 1:
        raise UserError(f"model.shard: tensor: a matrix of {whole} became one of {mine}, which is not understood here")
    return cut[0]


def _count_own_heads(model: nn.Module, size: int) -> None:
    """Let the model's arguments say what this process has: memory is reckoned by them."""
    args = copy.copy(model.args)
    if getattr(args, "head_dim", None) is None and hasattr(args, "hidden_size"):
        args.head_dim = args.hidden_size // args.num_attention_heads
    for name in HEADS:
        if getattr(args, name, None) is not None:
            setattr(args, name, getattr(args, name) // size)
    model.args = args
    model.shards = size


def is_divided(model: nn.Module) -> bool:
    """Whether this process holds a part of the model alone."""
    return getattr(model, "shards", 1) > 1


@contextmanager
def silent(model: nn.Module) -> Iterator[None]:
    """Exchange nothing inside the block: what is computed there means nothing, but takes as much memory.

    So each process can measure by itself, as often as it likes.
    """
    speaking, token = _speaking(model), _SILENT.set(True)
    try:
        for block, _ in speaking:
            block.sharding_group = None
        yield
    finally:
        _SILENT.reset(token)
        for block, group in speaking:
            block.sharding_group = group


def _speaking(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """The blocks of experts, which mlx-lm lets exchange what they compute, and their groups."""
    found = [(module, getattr(module, "sharding_group", None)) for module in model.modules()]
    return [(module, group) for module, group in found if group is not None]
