"""Splits a model into its body, which computes hidden states, and the head that projects them.

Heads differ by architecture: tied embeddings or a separate matrix, quantized or not, logits scaled (Cohere, Granite) or
capped (Gemma). None of this is reimplemented here: the head runs the model's own code, with the body replaced by a
module that passes hidden states through.
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
"""A model without its head: token ids `[B, L]` in, hidden states `[B, L, D]` out; `cache=` has one object per layer."""

BODIES = ("model", "transformer", "backbone")
"""Attributes of mlx-lm's models that hold everything except the head."""


class Unsplit(ValueError):
    """The model cannot be split into body and head. The message is the reason."""


class _Handed(nn.Module):  # type: ignore[misc]  # untyped
    """Replaces the body: returns the hidden states it is called with, and takes all attributes from the body."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self["body"] = body

    def __call__(self, hidden: mx.array, *_: Any, **__: Any) -> mx.array:
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self["body"], name)


def split_head(model: nn.Module) -> tuple[Body, Head]:
    """The body, token ids `[B, L]` to hidden states `[B, L, D]`, and the head, `[..., D]` to logits `[..., V]`.

    Raises Unsplit for a model that cannot be split. A trial on four tokens compares the logits of body and head with
    the model's. Some bodies (Phi's) require a `cache` argument, which may be None.
    """
    model = talking(model)
    probe = mx.array([[0, 1, 2, 3]])
    for name in BODIES:
        if not isinstance(body := model.get(name), nn.Module):
            continue
        head = _head(model, name, body)
        try:
            same = mx.allclose(head(body(probe, cache=None)), model(probe), rtol=1e-3, atol=1e-3).item()
        except Exception as error:  # the model's code, or grpo's, may raise anything
            raise Unsplit(f"the trial failed: {cause(error)}") from error
        if not same:
            raise Unsplit("this architecture's body and head, run separately, give other logits than the model")
        return body, head
    raise Unsplit(f"this architecture has no module named {' or '.join(BODIES)}")


def talking(model: nn.Module) -> nn.Module:
    """The language model inside a multimodal model; any other model is returned as it is."""
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
    """The trainable parameters outside the layers, which a trained head may read."""
    trained = tree_flatten(model.trainable_parameters())
    return tree_unflatten([(path, array) for path, array in trained if "layers" not in path.split(".")])
