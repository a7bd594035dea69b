"""Log-probabilities of tokens. Both the generator and the trainer use these functions."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.maths import chosen, logsumexp, logsumexp_and_softmax
from grpo.model.head import Head, head_parameters
from grpo.model.pieces import in_pieces

Pair = tuple[mx.array, mx.array]
Beside = Callable[[slice, mx.array], mx.array]
"""Computes a further value per token from a chunk's logits. Arguments: the slice of tokens, and their logits `[n, V]`,
float32, at the sampling temperature. Returns `[n]` float32."""

ROUNDING = {mx.float32: 1e-3, mx.bfloat16: 3e-2, mx.float16: 1e-2}
"""Mean difference in nats that rounding explains between two computations of the same logprobs, by dtype. (On CUDA
float32 is TF32.)"""
KV_ROUNDING = {8: 2e-2, 4: 3e-1}
"""Mean difference in nats that rounding explains, by the bits of keys and values (`rollout.kv_bits`). Ten times the
difference of models with random weights (2e-3 and 3e-2 for all head widths), which is about the difference with weights
three times as large."""
LOGITS = {False: 2**19, True: 2**25}
"""Logits per chunk, by whether there is a GPU. On a CPU 2 MB in float32, which fit in its cache; on a GPU 128 MB. The
number of tokens follows, so the loss's memory does not depend on the vocabulary. MLX has about ten operations in
flight, each of which may hold this much. On a CPU, fewer logits were faster, too."""
FEW_LOGITS = 2**23
"""Logits per chunk if memory is short: 32 MB. On one H200, with the 0.6B shape, an update takes 1.2 times as long."""

LEAST, CHUNK = 32, 1024
"""Fewest and most tokens in a chunk. Even the fewest make an efficient matrix product."""


def rounding(dtype: mx.Dtype, kv_bits: int | None = None) -> float:
    """The mean difference in nats that rounding explains, in this dtype and with keys and values of `kv_bits` bits."""
    return ROUNDING.get(dtype, min(ROUNDING.values())) + (KV_ROUNDING[kv_bits] if kv_bits else 0.0)


def scaled(logits: mx.array, temperature: float) -> mx.array:
    """Logits in fp32 at the sampling temperature: `[..., V]` of any dtype in, fp32 out."""
    logits = logits.astype(mx.float32)
    return logits if temperature == 1.0 else logits / temperature


def token_logprobs(scaled_logits: mx.array, tokens: mx.array) -> mx.array:
    """`log_softmax(scaled_logits)` at `tokens`: `[..., V]` fp32 and `[...]` integers in, `[...]` fp32 out."""
    return chosen(scaled_logits, tokens) - logsumexp(scaled_logits)


def logprobs_and_entropies(scaled_logits: mx.array, tokens: mx.array) -> Pair:
    """`token_logprobs`, and the entropies in nats over the whole vocabulary: two `[...]` fp32 arrays."""
    total, probabilities = logsumexp_and_softmax(scaled_logits)
    return chosen(scaled_logits, tokens) - total, total - (probabilities * scaled_logits).sum(axis=-1)


def with_entropies(scaled_logits: mx.array, tokens: mx.array, gradient: bool) -> Pair:
    """`logprobs_and_entropies`, where the entropies carry a gradient only if `gradient` is set."""
    logprobs, entropy = logprobs_and_entropies(scaled_logits, tokens)
    return logprobs, entropy if gradient else mx.stop_gradient(entropy)


def chunk_tokens(vocabulary: int, logits: int) -> int:
    """Number of tokens per chunk: at most `logits` logits, but between `LEAST` and `CHUNK` tokens."""
    return min(CHUNK, max(LEAST, logits // vocabulary // 16 * 16))


def chunked_logprobs(
    hidden: mx.array,
    tokens: mx.array,
    head: Head,
    temperature: float,
    chunk: int,
    entropy_gradient: bool = False,
    module: nn.Module | None = None,
    entropies: bool = True,
    beside: Beside | None = None,
) -> tuple[mx.array, ...]:
    """Logprobs and entropies of tokens from hidden states, without storing all the logits.

    hidden `[B, T, D]` in the model's dtype, tokens `[B, T]` integers; returns two `[B, T]` fp32 arrays. Logits exist
    for `chunk` tokens at a time, in the backward pass too, which recomputes them. The entropies carry a gradient only
    if `entropy_gradient` is set. Without `entropies`, only logprobs are computed and returned. The values of `beside`
    come last, `[B, T]`, differentiable. Trainable parameters that the head reads must belong to `module`.
    """
    rows, length, width = hidden.shape
    flat_tokens = tokens.reshape(-1)
    module = module or nn.Module()

    def project(start: int, states: mx.array) -> tuple[mx.array, ...]:
        logits = scaled(head(states), temperature)
        own = slice(start, start + len(states))
        tokens = flat_tokens[own]
        found = with_entropies(logits, tokens, entropy_gradient) if entropies else (token_logprobs(logits, tokens),)
        if beside is None:
            return found
        # Before the entropies: `mx.vjp` skips outputs behind `stop_gradient`, and would pair the outputs after them
        # with the wrong cotangents.
        return (found[0], beside(own, logits), *found[1:])

    found = in_pieces(project, hidden.reshape(rows * length, width), chunk, module, head_parameters(module))
    logprobs, *others = (values.reshape(rows, length) for values in found)
    return (logprobs, *others) if beside is None else (logprobs, *others[1:], others[0])
