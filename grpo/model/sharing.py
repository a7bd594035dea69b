"""Shared prompts: each of P prompts runs once, and B completions continue from its keys, values and states.

Both passes run the model's own code, with mlx-lm's cache protocol (`grpo.model.promptcaches`). The number of processed
tokens falls from B · (prompt + completion) to P · prompt + B · completion.

Positions and masks are the same as in whole sequences, so no token sees padding on the right of either pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.blame import cause, is_ours
from grpo.model.dropout import second_pass
from grpo.model.head import Body
from grpo.model.mlxlm import make_prompt_cache
from grpo.model.promptcaches import Kind, RowPrompts, for_rows, kinds


class Unshared(ValueError):
    """The model cannot continue completions from shared prompts. The message is the reason."""


def shared_hidden(
    body: Body,
    layers: Sequence[Kind],
    prompt_ids: mx.array,
    prompt_lengths: mx.array,
    index: mx.array,
    completion_ids: mx.array,
) -> mx.array:
    """The hidden states that predict the completions' tokens, `[B, T, D]`. Each prompt runs once.

    prompt_ids `[P, L]` and completion_ids `[B, T]` are padded on the right; prompt_lengths `[P]`; index `[B]` is the
    prompt of each completion.
    """
    prompts = [kind(prompt_lengths) for kind in layers]
    hidden = body(prompt_ids, cache=prompts)
    width = prompt_ids.shape[1]
    ends = mx.arange(-1, prompt_ids.size - 1, width) + prompt_lengths  # in the flattened array of prompts
    last = for_rows(hidden.reshape(prompt_ids.size, -1), ends[index])[:, None]
    rows = RowPrompts(prompt_lengths, index, width, hidden.dtype)
    with second_pass():
        own = body(completion_ids, cache=[prompt.continued(rows) for prompt in prompts])
    return mx.concatenate([last, own[:, :-1]], axis=1)


def whole_sequences(
    prompt_ids: mx.array, prompt_lengths: mx.array, index: mx.array, completion_ids: mx.array
) -> tuple[mx.array, mx.array]:
    """Prompt and completion concatenated: token ids `[B, L + T]`, padded on the right, and prompt lengths `[B]`."""
    lengths = prompt_lengths[index]
    column = mx.arange(prompt_ids.shape[1] + completion_ids.shape[1])[None] - lengths[:, None]
    begins = mx.arange(0, completion_ids.size, completion_ids.shape[1])[:, None]
    own = completion_ids.reshape(-1)[begins + mx.clip(column, 0, completion_ids.shape[1] - 1)]
    prompts = mx.pad(prompt_ids[index], [(0, 0), (0, completion_ids.shape[1])])
    return mx.where(column < 0, prompts, own), lengths


def shared_layers(model: nn.Module, body: Body) -> list[Kind]:
    """The replacement of each layer's cache, for `shared_hidden`. Raises Unshared if prompts cannot be shared.

    The layers must store keys and values or recurrent states. A trial on three short rows compares the hidden states
    with those of whole sequences.
    """
    try:
        layers = kinds(make_prompt_cache(model))
    except ValueError as error:
        raise Unshared(f"this architecture's layers cache more than keys and values or a state ({error})") from None
    prompts, lengths = mx.array([[1, 2, 3], [4, 5, 0]]), mx.array([3, 2])
    index, completions = mx.array([0, 1, 1]), mx.array([[6, 7], [8, 9], [10, 11]])
    tokens, starts = whole_sequences(prompts, lengths, index, completions)
    try:
        shared = shared_hidden(body, layers, prompts, lengths, index, completions)
        body_dtype, shared = shared.dtype, shared.astype(mx.float32)
        every = body(tokens, cache=None)  # [3, L, D]; two states per row are compared
        ends = mx.arange(0, tokens.size, tokens.shape[1])[:, None] + _predicting(starts, 2, tokens.shape[1])
        whole = for_rows(every.reshape(tokens.size, -1), ends.reshape(-1)).reshape(shared.shape).astype(mx.float32)
        gap: Any = (mx.linalg.norm(shared - whole) / mx.linalg.norm(whole)).item()
    except Exception as error:  # the model's code, or grpo's, may raise anything
        what = "the trial failed" if is_ours(error) else "this architecture does not take positions and masks by row"
        raise Unshared(f"{what}: {cause(error)}") from error
    bound = 0.01 if body_dtype == mx.float32 else 0.1  # rounding stays below; a real difference is of order 1
    if not gap < bound:
        raise Unshared(f"this architecture's attention depends on more than positions and masks (gap {gap:.2g})")
    return layers


def hidden_at(hidden: mx.array, prompt_lengths: mx.array, length: int) -> mx.array:
    """The hidden states that predict completion tokens, `[B, length, D]`, out of all hidden states `[B, L, D]`."""
    return mx.take_along_axis(hidden, _predicting(prompt_lengths, length, hidden.shape[1])[..., None], axis=1)


def _predicting(prompt_lengths: mx.array, length: int, width: int) -> mx.array:
    """Indices of the tokens that predict each row's completion tokens, `[B, length]`, in rows of `width` tokens."""
    return mx.minimum(prompt_lengths[:, None] - 1 + mx.arange(length)[None], width - 1)
