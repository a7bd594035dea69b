"""A model taken apart into hidden states and the head that projects them.

Architectures end differently: tied embeddings or a matrix of its own, quantised or not, logits scaled (Cohere, Granite)
or capped (Gemma). None of that is written down again here: the head *is* the model's own code, run with its body
replaced by one that hands through the hidden states it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from grpo.backend.blame import cause

Head = Callable[[mx.array], mx.array]
Body = Callable[..., mx.array]
"""A model without its head: token ids `[B, L]` in, hidden states `[B, L, D]` out, with `cache=` one object a layer."""

BODIES = ("model", "transformer", "backbone")
"""Names under which mlx-lm's models keep everything but their head."""


class Unsplit(ValueError):
    """Why a model cannot be taken apart."""


class _Handed(nn.Module):  # type: ignore[misc]  # untyped
    """In the body's place: gives back the hidden states it is called with; all else about it is the body's."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self["body"] = body

    def __call__(self, hidden: mx.array, *_: Any, **__: Any) -> mx.array:
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self["body"], name)


def split_head(model: nn.Module) -> tuple[Body, Head]:
    """The body, token ids `[B, L]` to hidden states `[B, L, D]`, and the head, `[..., D]` to logits `[..., V]`.

    Raises Unsplit for a model that cannot be taken apart. Whether the halves make the whole is tried, on four tokens.
    Some bodies (Phi's) want to be given a `cache`, if only None.
    """
    model = talking(model)
    probe = mx.array([[0, 1, 2, 3]])
    for name in BODIES:
        if not isinstance(body := model.get(name), nn.Module):
            continue
        head = _head(model, name, body)
        try:
            same = mx.allclose(head(body(probe, cache=None)), model(probe), rtol=1e-3, atol=1e-3).item()
        except Exception as error:  # whatever the model's own code raises, or ours
            raise Unsplit(f"the trial failed: {cause(error)}") from error
        if not same:
            raise Unsplit("this architecture's body and head, taken apart, give other logits than the model")
        return body, head
    raise Unsplit(f"this architecture has no module named {' or '.join(BODIES)}")


def talking(model: nn.Module) -> nn.Module:
    """Of a multimodal model the part that talks; any other model itself."""
    while (inner := getattr(model, "language_model", None)) is not None:
        model = inner
    return model


def _head(model: nn.Module, name: str, body: nn.Module) -> Head:
    handed = _Handed(body)

    def head(hidden: mx.array) -> mx.array:
        model[name] = handed
        try:
            logits: mx.array = model(hidden)
        finally:
            model[name] = body
        return logits

    return head


def head_parameters(model: nn.Module) -> Any:
    """The trainable parameters outside the layers: what a head that trains could read."""
    trained = tree_flatten(model.trainable_parameters())
    return tree_unflatten([(path, array) for path, array in trained if "layers" not in path.split(".")])
