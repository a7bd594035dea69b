"""Gradient checkpointing: a layer's activations are recomputed in the backward pass instead of stored.

`mx.checkpoint` gives gradients only to the function's arguments. Other arrays that the function reads (trainable
parameters, the keys and values of a cache) would silently lose their gradients, so they are passed as arguments here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.model.attending import as_now
from grpo.model.dropout import dropout_key, dropping
from grpo.model.offloading import Checkpoint
from grpo.model.rowwise import RowWise
from grpo.model.standins import put_before

CheckpointOf = Callable[[nn.Module], Checkpoint]
"""Returns the checkpoint function for a layer."""


def always(checkpoint: Checkpoint) -> CheckpointOf:
    """Use the same checkpoint function for every layer."""
    return lambda _: checkpoint


PLAIN = always(mx.checkpoint)


def checkpointed(
    module: nn.Module, parameters: Any, function: Callable[..., Any], checkpoint: Checkpoint = mx.checkpoint
) -> Callable[..., Any]:
    """`function` under `mx.checkpoint`, with `parameters` (a tree of `module`'s parameters) as additional inputs.

    Arguments must be arrays, or trees of arrays, that can have a gradient. `checkpoint` replaces `mx.checkpoint`.
    """

    def inner(given: Any, *arrays: Any) -> Any:
        module.update(given)
        try:
            return function(*arrays)
        finally:
            module.update(parameters)

    call = checkpoint(inner)
    return lambda *arrays: call(parameters, *arrays)


@contextmanager
def checkpointed_layers(
    layers: Sequence[nn.Module], on: bool | int, row_wise: RowWise, checkpoint_of: CheckpointOf = PLAIN
) -> Iterator[None]:
    """Checkpoint these layers inside the block. Outside, as in generation, they are unchanged.

    `on` is True (all), False (none), or the number of layers to checkpoint, from the first: the backward pass reaches
    the last layers first, so their stored activations are freed before an earlier layer is recomputed. `row_wise`
    parts are computed by tiles of tokens. `checkpoint_of` gives each layer's replacement for `mx.checkpoint`.
    """
    layers = layers if on is True else layers[: int(on)]
    own = {"row_wise": row_wise, "checkpoint_of": staticmethod(checkpoint_of)}
    with put_before(layers, _Checkpointed, own):
        yield


class _Checkpointed:
    """Mixin before a layer's class: recomputes the layer's activations in the backward pass."""

    row_wise: RowWise
    checkpoint_of: CheckpointOf

    def __call__(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        plain = super().__call__  # type: ignore[misc]  # the layer's class
        cache = next((a for a in (*args, *kwargs.values()) if hasattr(a, "bind")), None)
        # The backward pass runs later, with another dropout key or none, and outside the blocks of attention and cache.
        key = dropout_key()
        attention, in_tiles = as_now(), self.row_wise.inside
        inside = next((a.inside for a in (*args, *kwargs.values()) if hasattr(a, "inside")), nullcontext)

        def call(x: mx.array, inputs: list[mx.array]) -> Any:
            if cache is not None:
                cache.bind(inputs)
            with dropping(key), attention(), inside(self), in_tiles(self):
                out = plain(x, *args, **kwargs)
            return out, cache.outputs() if cache is not None else []

        inputs = cache.inputs() if cache is not None else []
        out, left = checkpointed(self, self.trainable_parameters(), call, self.checkpoint_of(self))(x, inputs)
        if cache is not None:
            cache.bind(inputs)
            cache.keep(left)
        return out
