"""How the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from grpo.model.logprobs import scaled, token_logprobs


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy; max_tokens counts the stop token."""

    temperature: float = 1.0
    max_tokens: int = 256


_categorical = mx.vmap(lambda logits, key: mx.random.categorical(logits, key=key))


def sample(logits: mx.array, keys: mx.array, temperature: float, logprobs: bool) -> tuple[mx.array, mx.array | None]:
    """Choose a token for each row.

    logits `[S, V]` of the model's dtype, keys `[S, 2]` uint32 (a row's draw depends on its own key alone).
    Returns tokens `[S]` uint32 and, if `logprobs`, theirs: `[S]` fp32 at the sampling temperature. Greedy
    choices have theirs at temperature 1.
    """
    rows = scaled(logits, temperature or 1.0)
    tokens = mx.argmax(rows, axis=-1) if temperature == 0 else _categorical(rows, keys)
    return tokens, token_logprobs(rows, tokens) if logprobs else None
