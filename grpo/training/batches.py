"""Groups become batches: padded arrays whose token weights are fixed before the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import mlx.core as mx

from grpo.config import Recipe
from grpo.model.policy import Policy
from grpo.objective import token_weights
from grpo.types import Batch, Group, Rollout, Task

Row = tuple[Task, Rollout]
Value = TypeVar("Value", int, float)


def make_batches(groups: Sequence[Group], cfg: Recipe, pad_to: int = 1) -> list[Batch]:
    """The step's rows as micro-batches of up to `optim.micro_batch_size`, of similar lengths.

    Rows whose loss has no gradient (advantage 0, and no KL penalty) are left out. Denominators count them, so
    that leaving them out changes nothing. Lengths are padded to multiples of `pad_to`.
    """
    rows = [(group.task, rollout) for group in groups for rollout in group.rollouts]
    weights = token_weights(_mask(rows), cfg.loss, cfg.rollout.max_completion_length)
    learning = [i for i, (_, rollout) in enumerate(rows) if rollout.advantage != 0 or cfg.loss.beta > 0]
    learning.sort(key=lambda i: len(rows[i][0].prompt_ids) + len(rows[i][1].completion.token_ids))
    size = cfg.optim.micro_batch_size
    parts = [learning[start : start + size] for start in range(0, len(learning), size)]
    return [_batch([rows[i] for i in part], weights[mx.array(part)], pad_to) for part in parts]


def with_reference(batches: Sequence[Batch], policy: Policy, beta: float) -> list[Batch]:
    """The same batches with the reference's logprobs; as they are when no KL penalty asks for them."""
    if beta == 0:
        return list(batches)
    with policy.use("reference"):
        return [replace(batch, ref_logprobs=_logprobs(policy, batch)) for batch in batches]


def _logprobs(policy: Policy, batch: Batch) -> mx.array:
    logprobs, _ = policy.logprobs(batch.tokens, batch.prompt_lengths, batch.completion_ids)
    mx.eval(logprobs)  # inside the block that has the reference active
    return logprobs


def _mask(rows: Sequence[Row]) -> mx.array:
    lengths = [len(rollout.completion.token_ids) for _, rollout in rows]
    return (mx.arange(max(lengths))[None] < mx.array(lengths)[:, None]).astype(mx.float32)


def _batch(rows: Sequence[Row], weights: mx.array, pad_to: int) -> Batch:
    prompts = [list(task.prompt_ids) for task, _ in rows]
    completions = [list(rollout.completion.token_ids) for _, rollout in rows]
    together = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    length = _rounded(max(map(len, completions)), pad_to)
    mask = _padded([[1.0] * len(ids) for ids in completions], length, 0.0)
    return Batch(
        tokens=mx.array(_padded(together, _rounded(max(map(len, together)), pad_to), 0)),
        prompt_lengths=mx.array([len(prompt) for prompt in prompts]),
        completion_ids=mx.array(_padded(completions, length, 0)),
        mask=mx.array(mask),
        advantages=mx.array([rollout.advantage for _, rollout in rows]),
        weights=_fitted(weights, length),
        sampling_logprobs=mx.array(_padded([_sampled(rollout) for _, rollout in rows], length, 0.0)),
    )


def _sampled(rollout: Rollout) -> list[float]:
    assert rollout.completion.logprobs is not None, "training needs rollouts with logprobs"
    return list(rollout.completion.logprobs)


def _padded(rows: list[list[Value]], length: int, filler: Value) -> list[list[Value]]:
    return [row + [filler] * (length - len(row)) for row in rows]


def _fitted(weights: mx.array, length: int) -> mx.array:
    """Weights `[B, T]` cut or padded with 0 to `length`; what is cut lies behind the rows' ends."""
    return mx.pad(weights[:, :length], [(0, 0), (0, max(0, length - weights.shape[1]))])


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
