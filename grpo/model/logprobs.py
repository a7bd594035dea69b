"""Log-probabilities of tokens. The generator and the trainer both take theirs from here."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from grpo.model.checkpointing import checkpointed
from grpo.model.head import Head, head_parameters

LOGITS = 2**26
"""Logits that live at once, 256 MB in float32, of however many tokens that is: the loss's memory does not depend on the
vocabulary."""


def scaled(logits: mx.array, temperature: float) -> mx.array:
    """Logits in fp32 at the sampling temperature: `[..., V]` of any dtype in, fp32 out."""
    logits = logits.astype(mx.float32)
    return logits if temperature == 1.0 else logits / temperature


def token_logprobs(scaled_logits: mx.array, tokens: mx.array) -> mx.array:
    """`log_softmax(scaled_logits)` at `tokens`: `[..., V]` fp32 and `[...]` integers in, `[...]` fp32 out."""
    chosen = mx.take_along_axis(scaled_logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - mx.logsumexp(scaled_logits, axis=-1)


def entropies(scaled_logits: mx.array) -> mx.array:
    """Entropy in nats over the whole vocabulary: `[..., V]` fp32 in, `[...]` fp32 out."""
    probabilities = mx.softmax(scaled_logits, axis=-1)
    return mx.logsumexp(scaled_logits, axis=-1) - (probabilities * scaled_logits).sum(axis=-1)


def chunk_tokens(vocabulary: int) -> int:
    """How many tokens to project at once, so that their logits fill no more than `LOGITS`."""
    return max(16, LOGITS // vocabulary // 16 * 16)


def chunked_logprobs(
    hidden: mx.array,
    tokens: mx.array,
    head: Head,
    temperature: float,
    chunk: int,
    entropy_gradient: bool = False,
    module: nn.Module | None = None,
) -> tuple[mx.array, mx.array]:
    """Logprobs and entropies of tokens from hidden states, without ever holding all the logits.

    hidden `[B, T, D]` of the model's dtype, tokens `[B, T]` integers; returns two `[B, T]` fp32 arrays. Logits
    live for `chunk` tokens at a time, in the backward pass too, which computes them again. The entropies carry a
    gradient only if `entropy_gradient`. Trainable parameters that the head reads must be `module`'s.
    """
    rows, length, _ = hidden.shape
    flat_hidden, flat_tokens = hidden.reshape(rows * length, -1), tokens.reshape(-1)

    def project(states: mx.array, start: int) -> tuple[mx.array, mx.array]:
        logits = scaled(head(states), temperature)
        chosen = token_logprobs(logits, flat_tokens[start : start + chunk])
        entropy = entropies(logits)
        return chosen, entropy if entropy_gradient else mx.stop_gradient(entropy)

    module = module or nn.Module()
    parameters = head_parameters(module)
    parts = [
        checkpointed(module, parameters, partial(project, start=start))(flat_hidden[start : start + chunk])
        for start in range(0, rows * length, chunk)
    ]
    logprobs, entropy = (mx.concatenate(list(part)).reshape(rows, length) for part in zip(*parts, strict=True))
    return logprobs, entropy
