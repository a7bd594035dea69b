"""Tensor parallelism: several processes share one model; each holds a part of every large matrix (arXiv 1909.08053).

mlx-lm divides the model (`Model.shard`). A layer divided by column holds some of the outputs, and sums the gradient of
its input over the processes; a layer divided by row holds some of the inputs, and sums its outputs. Nothing is
exchanged between the two.
Here these layers are subclasses of the ordinary linear layers, so adapters, quantization and decoding treat them alike.
An adapter is divided like its base layer: by column, A `[in, r]` is whole and B `[r, out / n]` is divided; by row, A
`[in / n, r]` is divided and B `[r, out]` is whole. Whole arrays are the same in all processes; their gradients are
sums.
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
"""The architectures whose gradients are known to be right when they are divided. MiniMax's are wrong, because its norms
span all heads; with latent attention, the gradients of whole arrays come out in parts."""
HEADS = ("num_attention_heads", "num_key_value_heads")
LINEAR = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)

_SILENT: ContextVar[bool] = ContextVar("whether nothing is exchanged", default=False)


def scattered(x: mx.array, group: Processes) -> mx.array:
    """`x` itself, with its gradient summed over the group: each process computes the part from its own outputs."""
    return distributed.sum_gradients(group)(x) if _speaks(group) else x


def summed(x: mx.array, group: Processes) -> mx.array:
    """The sum of `x` over the group. Each process already has the sum's whole gradient."""
    return mx.distributed.all_sum(x, group=group) if _speaks(group) else x


def _speaks(group: Any) -> bool:
    """Whether anything is exchanged: not inside `silent`, and not in a model's outline, which has no processes."""
    return isinstance(group, Processes) and not _SILENT.get()


class ByColumn:
    """Mixin before a linear layer's class: the layer computes some of the outputs."""

    group: Processes

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., in]`, the same in all processes, to `[..., out / n]`."""
        out: mx.array = super().__call__(scattered(x, self.group))  # type: ignore[misc]  # the layer's class
        return out


class ByRow:
    """Mixin before a linear layer's class: the layer reads some of the inputs. Only the first process has the bias; the
    others have zeros."""

    group: Processes

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., in / n]` to `[..., out]`, the same in all processes."""
        return summed(super().__call__(x), self.group)  # type: ignore[misc]  # the layer's class


class ColumnLinear(ByColumn, nn.Linear):  # type: ignore[misc]  # untyped
    """An `nn.Linear` divided by column."""


class RowLinear(ByRow, nn.Linear):  # type: ignore[misc]  # untyped
    """An `nn.Linear` divided by row."""


class QuantizedColumnLinear(ByColumn, nn.QuantizedLinear):  # type: ignore[misc]  # untyped
    """An `nn.QuantizedLinear` divided by column."""


class QuantizedRowLinear(ByRow, nn.QuantizedLinear):  # type: ignore[misc]  # untyped
    """An `nn.QuantizedLinear` divided by row."""


OURS: Mapping[type, type] = {
    distributed.AllToShardedLinear: ColumnLinear,
    distributed.ShardedToAllLinear: RowLinear,
    distributed.QuantizedAllToShardedLinear: QuantizedColumnLinear,
    distributed.QuantizedShardedToAllLinear: QuantizedRowLinear,
}
"""Replacements for MLX's divided layers, by class."""


def divide(model: nn.Module, ranks: Ranks) -> None:
    """Reduce `model` (in place) to this process's part, where `ranks` share it. Nothing is evaluated.

    Raises UserError for an architecture that mlx-lm cannot divide, or not among this number of processes.
    """
    if ranks.size == 1:
        return
    _check_divides(model, ranks.size)
    shapes = {path: module.weight.shape for path, module in model.named_modules() if isinstance(module, LINEAR)}
    try:
        model.shard(ranks.group)
    except Exception as error:  # mlx-lm's and MLX's code may raise anything
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
    """The axis along which the matrix of a linear layer, or of an adapter's base, is divided: -2 (outputs), -1 (inputs)
    or None (whole)."""
    cut: int | None = getattr(layer.linear if "lora_a" in layer else layer, "cut", None)
    return cut


def hand_over(layer: nn.Module, by_column: type, by_row: type) -> None:
    """Move the exchange from a divided base layer to its adapter's layer, so that one sum serves both: the base becomes
    an ordinary linear layer. An adapter's layer over an undivided base is left alone."""
    base = layer.linear
    if isinstance(base, ByColumn | ByRow):
        layer.__class__ = by_column if isinstance(base, ByColumn) else by_row
        layer.group = base.group
        base.__class__ = nn.Linear if isinstance(base, nn.Linear) else nn.QuantizedLinear


def _check_divides(model: nn.Module, size: int) -> None:
    architecture = type(model).__module__.rpartition(".")[2]
    if architecture not in TRAINED:
        why = (
            "mlx-lm can divide it for sampling, but its gradients are not known to be right when it is divided"
            if hasattr(model, "shard")
            else "mlx-lm does not divide it"
        )
        raise UserError(
            f"model.shard: tensor: the architecture {architecture}: {why}. Supported architectures are "
            f"{', '.join(TRAINED)}. Remove model.shard"
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
    """The axis along which a layer's matrix is divided: -2 (outputs), -1 (inputs) or None (whole)."""
    mine = module.weight.shape
    if mine == whole:
        return None
    cut = [axis for axis in (-2, -1) if mine[axis] * size == whole[axis]]
    if len(cut) != 1:
        raise UserError(
            f"model.shard: tensor: a matrix of {whole} became {mine}, which is no division by outputs or inputs"
        )
    return cut[0]


def _count_own_heads(model: nn.Module, size: int) -> None:
    """Set the model's arguments to this process's number of heads, because memory is estimated from them."""
    args = copy.copy(model.args)
    if getattr(args, "head_dim", None) is None and hasattr(args, "hidden_size"):
        args.head_dim = args.hidden_size // args.num_attention_heads
    for name in HEADS:
        if getattr(args, name, None) is not None:
            setattr(args, name, getattr(args, name) // size)
    model.args = args
    model.shards = size


def is_divided(model: nn.Module) -> bool:
    """Whether this process holds only a part of the model."""
    return getattr(model, "shards", 1) > 1


@contextmanager
def silent(model: nn.Module) -> Iterator[None]:
    """Exchange nothing inside the block: results are meaningless, but take as much memory as real ones.

    So each process can measure its memory independently of the others.
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
    """The expert blocks in which mlx-lm exchanges results, and their groups."""
    found = [(module, getattr(module, "sharding_group", None)) for module in model.modules()]
    return [(module, group) for module, group in found if group is not None]
