"""Finds, by trial, how a model can be decoded fastest.

Every way is tried on a few tokens against the model's plain forward pass, and the first that agrees is taken. Where
none does, mlx-lm's own batch caches serve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.device import on_gpu
from grpo.generation.attention import Attention, FusedRowAttention, StockAttention
from grpo.generation.batchcaches import BatchCaches
from grpo.generation.blocks import read
from grpo.generation.buffers import CacheShape, cache_shapes
from grpo.generation.cuda_attention import CudaAttention, serves
from grpo.generation.decoders import BlockDecoder, Decoder, ModelDecoder
from grpo.generation.decoding import Decoding, SharedPrefix, Work
from grpo.model.adapters import dtype_of
from grpo.model.logprobs import ROUNDING

PROMPTS, FORCED = ([1, 2, 3], [4, 5, 6, 7, 8]), ([9, 10, 11], [12, 13, 14])

MODEL_ERRORS = (ValueError, TypeError, AttributeError, IndexError, KeyError, RuntimeError)
"""What a model's own code raises when it is asked for something that it does not do."""


def find_decoding(model: nn.Module) -> Decoding:
    """The fastest way of decoding this model that agrees with its forward pass."""
    vocabulary = int(model(mx.array([[0]])).shape[-1])
    shapes = cache_shapes(model)
    forced, dtype = _teacher_forced(model, vocabulary)
    for decoder, attention, description in _candidates(model, shapes or []):
        decoding = SharedPrefix(model, decoder, attention, shapes or [], vocabulary, description)
        if _agrees(decoding, forced, dtype):
            return decoding
    together = BatchCaches(model, vocabulary)
    return together if _agrees(together, forced, dtype) else BatchCaches(model, vocabulary, joined=False)


def _candidates(model: nn.Module, shapes: Sequence[CacheShape]) -> Iterator[tuple[Decoder, Attention, str]]:
    if not shapes:
        return
    blocks = read(model)
    attentions: list[tuple[Attention, str]] = [
        (FusedRowAttention() if on_gpu() else StockAttention(), "stock operations")
    ]
    if serves(shapes, int(getattr(model.args, "num_attention_heads", 0))):
        attentions.insert(0, (CudaAttention(), "CUDA kernels"))
    for attention, name in attentions:
        if blocks is not None:
            yield BlockDecoder(blocks), attention, f"joined layers, shared prompts, {name}"
        yield ModelDecoder(model), attention, f"the model's layers, shared prompts, {name}"


def _teacher_forced(model: nn.Module, vocabulary: int) -> tuple[mx.array, mx.Dtype]:
    """Log-probabilities after each forced token, `[2, 3, V]` fp32, and the dtype that the model computes in."""
    rows = []
    for prompt, forced in zip(PROMPTS, FORCED, strict=True):
        logits = model(mx.array([[*prompt, *forced]]) % vocabulary)[0, len(prompt) - 1 : -1]
        rows.append(logits)
    return _normalised(mx.stack(rows).astype(mx.float32)), dtype_of(model)


def _agrees(decoding: Decoding, expected: mx.array, dtype: mx.Dtype) -> bool:
    prompts = [[token % decoding.vocabulary for token in prompt] for prompt in PROMPTS]
    fed = mx.array([[prompt[-1], *forced[:-1]] for prompt, forced in zip(PROMPTS, FORCED, strict=True)])
    try:
        session = decoding.open(Work(prompts, [1, 1], slots=2, max_tokens=3))
        session.admit([0, 1], [0, 1])
        steps = []
        for step in range(3):
            steps.append(session.logits((fed % decoding.vocabulary)[:, step]).astype(mx.float32))
            mx.eval(steps[-1])
        gap: Any = mx.abs(_normalised(mx.stack(steps, axis=1)) - expected).mean().item()
    except MODEL_ERRORS:
        return False
    return bool(gap <= ROUNDING.get(dtype, min(ROUNDING.values())))


def _normalised(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
