"""Log-probabilities of tokens. The generator and the trainer both take theirs from here."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.maths import logsumexp

Head = Callable[[mx.array], mx.array]
Body = Callable[[mx.array], mx.array]

ROUNDING = {mx.float32: 1e-3, mx.bfloat16: 3e-2, mx.float16: 1e-2}
"""Mean gap in nats that rounding explains between two ways to the same logprobs, by dtype (on CUDA float32 is TF32)."""
CHUNK = 2048
"""Tokens projected to the vocabulary at once in `chunked_logprobs`."""


def scaled(logits: mx.array, temperature: float) -> mx.array:
    """Logits in fp32 at the sampling temperature: `[..., V]` of any dtype in, fp32 out."""
    logits = logits.astype(mx.float32)
    return logits if temperature == 1.0 else logits / temperature


def token_logprobs(scaled_logits: mx.array, tokens: mx.array) -> mx.array:
    """`log_softmax(scaled_logits)` at `tokens`: `[..., V]` fp32 and `[...]` integers in, `[...]` fp32 out."""
    chosen = mx.take_along_axis(scaled_logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - logsumexp(scaled_logits)


def entropies(scaled_logits: mx.array) -> mx.array:
    """Entropy in nats over the whole vocabulary: `[..., V]` fp32 in, `[...]` fp32 out."""
    probabilities = mx.softmax(scaled_logits, axis=-1)
    return logsumexp(scaled_logits) - (probabilities * scaled_logits).sum(axis=-1)


def split_head(model: nn.Module) -> tuple[Body, Head] | None:
    """A model as hidden states and a head that projects them, or None if it cannot be taken apart.

    mlx-lm's models are a `.model` under an `lm_head` or tied embeddings; some scale or cap their logits besides.
    Whether the two halves make the whole is not assumed but tried, on four tokens.
    """
    body = getattr(model, "model", None)
    head = getattr(model, "lm_head", None)
    if head is None:
        head = getattr(getattr(body, "embed_tokens", None), "as_linear", None)
    if body is None or head is None:
        return None
    probe = mx.array([[0, 1, 2, 3]])
    try:
        same = mx.array_equal(head(body(probe)), model(probe)).item()
    except (TypeError, ValueError, AttributeError):  # a body with another signature
        return None
    return (body, head) if same else None


def chunked_logprobs(
    hidden: mx.array, tokens: mx.array, head: Head, temperature: float, entropy_gradient: bool = False
) -> tuple[mx.array, mx.array]:
    """Logprobs and entropies of tokens from hidden states, without ever holding all the logits.

    hidden `[B, T, D]` of the model's dtype, tokens `[B, T]` integers; returns two `[B, T]` fp32 arrays. Logits
    live for `CHUNK` tokens at a time, in the backward pass too, which computes them again. The entropies carry a
    gradient only if `entropy_gradient`.
    """
    rows, length, _ = hidden.shape
    flat_hidden, flat_tokens = hidden.reshape(rows * length, -1), tokens.reshape(-1)

    def project(chunk: mx.array, chosen: mx.array) -> tuple[mx.array, mx.array]:
        logits, chosen = scaled(head(chunk), temperature), mx.stop_gradient(chosen)
        entropy = entropies(logits)
        return token_logprobs(logits, chosen), entropy if entropy_gradient else mx.stop_gradient(entropy)

    checkpointed = mx.checkpoint(project)
    parts = [
        checkpointed(flat_hidden[start : start + CHUNK], flat_tokens[start : start + CHUNK])
        for start in range(0, rows * length, CHUNK)
    ]
    logprobs, entropy = (mx.concatenate(list(part)).reshape(rows, length) for part in zip(*parts, strict=True))
    return logprobs, entropy
