"""Rows that have said something, without a model."""

from collections.abc import Sequence

import mlx.core as mx

from grpo.generation.rows import Row, SharedPrompt
from grpo.generation.sampling import Sampling
from grpo.generation.stopping import Stopping


def row_of(prompt: SharedPrompt, tokens: Sequence[int] = (), temperature: float = 1.0, logprobs: bool = True) -> Row:
    """A row of a prompt that has said these tokens."""
    stopping = Stopping(Sampling(temperature, 1000), frozenset(), lambda _: "")
    return Row(prompt, token_ids=list(tokens), key=mx.zeros(2, mx.uint32), stopping=stopping, wants_logprobs=logprobs)


def ended(spoken: Sequence[int], prompt: Sequence[int], drafts: object) -> Row:
    """A row that said all this and ended, and is remembered. It was the only one of its group."""
    row = row_of(SharedPrompt(prompt), spoken)
    drafts.remember(row)  # type: ignore[attr-defined]
    row.prompt.left = 0
    return row
