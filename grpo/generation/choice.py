"""Finds, by trial, the fastest decoding for a model.

Each kind of decoding is compared with the model's plain forward pass on a few tokens, and the first that agrees is
used. If none agrees, mlx-lm's own batch caches are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.blame import cause
from grpo.backend.device import on_gpu
from grpo.errors import UserError
from grpo.generation.attention import Attention, FusedRowAttention, StockAttention
from grpo.generation.batchcaches import BatchCaches
from grpo.generation.blocks import Blocks, read
from grpo.generation.buffers import CacheShape, cache_shapes
from grpo.generation.cuda_attention import CudaAttention, serves
from grpo.generation.decoders import BlockDecoder, Decoder, ModelDecoder
from grpo.generation.decoding import Decoding, Session, SharedPrefix
from grpo.generation.joined import Unread
from grpo.generation.packed import packed
from grpo.generation.rows import Line, SharedPrompt
from grpo.generation.slots import Size
from grpo.model.logprobs import rounding
from grpo.model.quantized import dtype_of

PROMPTS, FORCED = ([1, 2, 3], [4, 5, 6, 7, 8]), ([9, 10, 11], [12, 13, 14])

FOREIGN = "this architecture keeps more than plain keys and values"
"""Why rows cannot share prompts if a layer has a cache other than mlx-lm's `KVCache`."""
UNPACKED = "they cannot read quantized keys and values (rollout.kv_bits)"
"""Why CUDA kernels are not used."""


def find_decoding(model: nn.Module, kv_bits: int | None = None) -> Decoding:
    """The fastest decoding of this model that agrees with its forward pass, with keys and values in `kv_bits` bits.

    The result's `refused` says why each faster kind is not used: an exception, or a part of the architecture that it
    does not support. The model's own code may compute something else when it is fed several tokens of a row: then
    steps feed one token per row, and `narrow` says why.

    Raises UserError if the keys and values of the model cannot be quantized.
    """
    vocabulary = int(model(mx.array([[0]])).shape[-1])
    expected = _teacher_forced(model, vocabulary)
    refused: list[str] = []
    shapes = _shapes(model, refused)
    kept = packed(shapes, kv_bits) if kv_bits else shapes
    for decoder, attention, description in _candidates(model, shapes, refused, kv_bits) if shapes else ():
        decoding = SharedPrefix(model, decoder, attention, shapes, vocabulary, description, tuple(refused))
        if (why := _fault(decoding, *expected)) is None and kv_bits:
            description += f", keys and values in {kv_bits} bits"
            decoding = SharedPrefix(model, decoder, attention, kept, vocabulary, description, tuple(refused))
            why = _fault(decoding, *expected, kv_bits=kv_bits)
        if why is None:
            if isinstance(decoder, ModelDecoder) and (why := _fault(decoding, *expected, wide=True)):
                decoding.narrow = decoding.narrow or f"this model cannot decode several tokens per step: {why}"
            return decoding
        refused.append(f"{description}: {why}")
    why = refused.pop()  # the last reason is in the description
    if kv_bits:
        raise UserError(
            f"rollout.kv_bits: the keys and values of this model cannot be quantized: {why}. Remove the setting"
        )
    together = BatchCaches(model, vocabulary, True, why, tuple(refused))
    if (fault := _fault(together, *expected)) is None:
        return together
    return BatchCaches(model, vocabulary, False, why, (*refused, f"mlx-lm's batch caches, all rows together: {fault}"))


def _shapes(model: nn.Module, refused: list[str]) -> list[CacheShape]:
    """What each layer caches. If rows cannot share prompts, returns an empty list and adds the reason to `refused`."""
    try:
        if shapes := cache_shapes(model):
            return shapes
        refused.append(FOREIGN)
    except Exception as error:  # from the model's own code, or from ours
        refused.append(f"running one token to inspect the caches failed: {cause(error)}")
    return []


def _candidates(
    model: nn.Module, shapes: Sequence[CacheShape], refused: list[str], kv_bits: int | None
) -> Iterator[tuple[Decoder, Attention, str]]:
    blocks: Blocks | None = None
    try:
        blocks = read(model)
    except Unread as reason:
        refused.append(f"joined layers: {reason}")
    fused = on_gpu() and not kv_bits
    attentions: list[tuple[Attention, str]] = [(FusedRowAttention() if fused else StockAttention(), "stock operations")]
    if serves(shapes, int(getattr(model.args, "num_attention_heads", 0))):
        if kv_bits:
            refused.append(f"CUDA kernels: {UNPACKED}")
        else:
            attentions.insert(0, (CudaAttention(), "CUDA kernels"))
    for attention, name in attentions:
        if blocks is not None:
            yield BlockDecoder(blocks), attention, f"joined layers, shared prompts, {name}"
        yield ModelDecoder(model), attention, f"the model's layers, shared prompts, {name}"


def _teacher_forced(model: nn.Module, vocabulary: int) -> tuple[mx.array, mx.Dtype]:
    """The logprobs that predict each forced token, `[2, 3, V]` fp32, and the dtype that the model computes in."""
    rows = []
    for prompt, forced in zip(PROMPTS, FORCED, strict=True):
        logits = model(mx.array([[*prompt, *forced]]) % vocabulary)[0, len(prompt) - 1 : -1]
        rows.append(logits)
    return _normalised(mx.stack(rows).astype(mx.float32)), dtype_of(model)


def _fault(
    decoding: Decoding, expected: mx.array, dtype: mx.Dtype, wide: bool = False, kv_bits: int | None = None
) -> str | None:
    """Why a decoding is not usable: its exception, or its gap from the forward pass. None if it is usable.

    The trial uses plain steps, or one `wide` step. With `kv_bits`, the bound allows for the quantization.
    """
    prompts = [[token % decoding.vocabulary for token in prompt] for prompt in PROMPTS]
    fed = mx.array([[prompt[-1], *forced[:-1]] for prompt, forced in zip(PROMPTS, FORCED, strict=True)])
    try:
        session = decoding.open(Size(slots=2, places=2, prefix=max(map(len, prompts)) - 1, columns=3))
        session.admit([0, 1], [Line(SharedPrompt(prompt)) for prompt in prompts])
        found = (_wide_step if wide else _steps)(session, fed % decoding.vocabulary)
        gap: Any = mx.abs(_normalised(found) - expected[:, : found.shape[1]]).mean().item()
    except Exception as error:  # from the model's own code, or from ours
        return cause(error)
    bound = rounding(dtype, kv_bits)
    if gap <= bound:
        return None
    return f"its logprobs differ by {gap:.2g} from the model's forward pass (bound {bound:.1g})"


def _steps(session: Session, fed: mx.array) -> mx.array:
    """The logits after each of these tokens `[S, W]`, fed one by one: `[S, W, V]` fp32."""
    steps = []
    for column in range(fed.shape[1]):
        steps.append(session.logits(fed[:, column]).astype(mx.float32))
        mx.eval(steps[-1])
    return mx.stack(steps, axis=1)


def _wide_step(session: Session, fed: mx.array) -> mx.array:
    """The logits after each of the first two tokens, fed together, because wide steps feed 2, 4 or 8 tokens."""
    return session.wide(fed[:, :2]).astype(mx.float32)


def _normalised(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
