"""Groups become batches: padded arrays whose token weights are fixed before the split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx

from grpo.config import Recipe
from grpo.model.policy import Policy
from grpo.objective import token_weights
from grpo.objective.masks import top_entropy_mask
from grpo.types import Batch, Group, Rollout, Task

Row = tuple[Task, Rollout]
MiniBatch = list[Batch]
Value = TypeVar("Value", int, float)


def make_minibatches(groups: Sequence[Group], cfg: Recipe, pad_to: int = 1) -> list[MiniBatch]:
    """The step's groups as `optim.num_minibatches` minibatches, one for each update of a pass."""
    size = -(-len(groups) // cfg.optim.num_minibatches)
    return [make_batches(groups[start : start + size], cfg, pad_to) for start in range(0, len(groups), size)]


def make_batches(groups: Sequence[Group], cfg: Recipe, pad_to: int = 1) -> MiniBatch:
    """The groups' rows as micro-batches of up to `optim.micro_batch_size`, of similar lengths.

    Rows that can have no gradient (advantage 0 and nothing else in the loss, or no tokens) are left out. Denominators
    count them, so that leaving them out changes nothing. Lengths are padded to multiples of `pad_to`.
    """
    rows = [(group.task, rollout) for group in groups for rollout in group.rollouts]
    mask = _mask(rows, cfg)
    weights = token_weights(mask, cfg.loss, cfg.rollout.max_completion_length)
    seen: Any = (mask.sum(axis=1) > 0).tolist()
    learning = [i for i, (_, r) in enumerate(rows) if seen[i] and (r.advantage != 0 or _all_rows_count(cfg))]
    learning.sort(key=lambda i: len(rows[i][0].prompt_ids) + len(rows[i][1].completion.token_ids))
    size = cfg.optim.micro_batch_size
    parts = [learning[start : start + size] for start in range(0, len(learning), size)]
    batches = [collate([rows[i] for i in p], mask[mx.array(p)], weights[mx.array(p)], pad_to) for p in parts]
    return _with_weights(batches, mask[mx.array(learning)], cfg) if _local(cfg) and batches else batches


def with_reference(batches: Sequence[Batch], policy: Policy, beta: float, cfg: Recipe) -> MiniBatch:
    """The same batches with the reference's logprobs and the penalty's weight; as they are where the loss has none."""
    if beta == 0 or cfg.loss.kl_in != "loss":
        return list(batches)
    with policy.use("reference"):
        return [replace(batch, ref_logprobs=_forced(policy, batch)[0], beta=mx.array(beta)) for batch in batches]


def with_old_logprobs(minibatches: Sequence[MiniBatch], policy: Policy, cfg: Recipe) -> list[MiniBatch]:
    """The same minibatches with the policy's logprobs as it is now, before the step's first update.

    The first minibatch needs none: its logprobs when it is reached are these. dppo measures from the sampler.
    """
    if cfg.loss.preset.surrogate == "dppo":
        return [[replace(b, old_logprobs=b.sampling_logprobs) for b in batches] for batches in minibatches]
    first, *others = minibatches
    return [first] + [[replace(b, old_logprobs=_forced(policy, b)[0]) for b in batches] for batches in others]


def with_top_entropy(minibatches: Sequence[MiniBatch], policy: Policy, cfg: Recipe) -> list[MiniBatch]:
    """The same minibatches with weight only on the step's tokens of highest entropy.

    The masks stay: what is measured of a whole completion (its ratio, say) is measured of all its tokens.
    """
    everything = [batch for batches in minibatches for batch in batches]
    if cfg.loss.top_entropy_quantile == 1 or not everything:
        return list(minibatches)
    longest = max(batch.mask.shape[1] for batch in everything)
    entropies = mx.concatenate([_fitted(_forced(policy, batch)[1], longest) for batch in everything])
    mask = mx.concatenate([_fitted(batch.mask, longest) for batch in everything])
    chosen, start, weighted = top_entropy_mask(entropies, mask, cfg.loss.top_entropy_quantile), 0, []
    for batches in minibatches:
        sizes = [batch.mask.shape[0] for batch in batches]
        part = chosen[start : start + sum(sizes)]
        weighted.append(_with_weights(batches, part, cfg))
        start += sum(sizes)
    return weighted


def _with_weights(batches: MiniBatch, chosen: mx.array, cfg: Recipe) -> MiniBatch:
    """A minibatch with weights from the tokens that were chosen of its rows, `[N, T]`."""
    weights = token_weights(chosen, cfg.loss, cfg.rollout.max_completion_length)
    changed, start = [], 0
    for batch in batches:
        rows, width = batch.mask.shape
        own = slice(start, start + rows)
        if _local(cfg):
            local = token_weights(chosen[own], cfg.loss, cfg.rollout.max_completion_length) / len(batches)
            changed.append(replace(batch, weights=local[:, :width]))
        else:
            changed.append(replace(batch, weights=weights[own, :width]))
        start += rows
    return changed


def mean_entropy(groups: Sequence[Group], policy: Policy, cfg: Recipe) -> float:
    """The mean entropy of the groups' tokens, for a step whose update saw none of them."""
    total = tokens = 0.0
    for batch in whole_batches(groups, cfg):
        total += float((_forced(policy, batch)[1] * batch.mask).sum())
        tokens += float(batch.mask.sum())
    return total / tokens


def whole_batches(groups: Sequence[Group], cfg: Recipe) -> Iterator[Batch]:
    """All rows of the groups in their order, by `optim.micro_batch_size`, to be looked at rather than learnt from."""
    rows = [(group.task, rollout) for group in groups for rollout in group.rollouts]
    for start in range(0, len(rows), cfg.optim.micro_batch_size):
        part = rows[start : start + cfg.optim.micro_batch_size]
        mask = _mask_of([len(rollout.completion.token_ids) for _, rollout in part])
        yield collate(part, mask, mask)


def collate(rows: Sequence[Row], mask: mx.array, weights: mx.array, pad_to: int = 1) -> Batch:
    """Rows as one batch; mask and weights `[B, ≥ T]` are fitted to it."""
    prompts = [list(task.prompt_ids) for task, _ in rows]
    completions = [list(rollout.completion.token_ids) for _, rollout in rows]
    together = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    length = _rounded(max(map(len, completions)), pad_to)
    return Batch(
        tokens=mx.array(_padded(together, _rounded(max(map(len, together)), pad_to), 0)),
        prompt_lengths=mx.array([len(prompt) for prompt in prompts]),
        completion_ids=mx.array(_padded(completions, length, 0)),
        mask=_fitted(mask, length),
        advantages=mx.array([rollout.advantage for _, rollout in rows]),
        weights=_fitted(weights, length),
        sampling_logprobs=mx.array(_padded([_sampled(rollout) for _, rollout in rows], length, 0.0)),
        sampler_logprobs=_drawn(rows, length),
    )


def _all_rows_count(cfg: Recipe) -> bool:
    """Whether a row without advantage may have a gradient, or a say in which tokens or how many are trained on."""
    loss = cfg.loss
    chosen = loss.top_entropy_quantile < 1 or _local(cfg)
    squared = loss.preset.surrogate == "dppo"  # its penalty does not know advantages
    penalised = loss.kl_in == "loss" and (loss.beta > 0 or bool(loss.beta_end))
    return penalised or chosen or squared or loss.entropy_coef > 0 or loss.use is not None


def _local(cfg: Recipe) -> bool:
    return cfg.loss.preset.normalize == "micro_batch"


def _forced(policy: Policy, batch: Batch) -> tuple[mx.array, mx.array]:
    """Logprobs and entropies under the active state, evaluated while it is active."""
    found = policy.logprobs(batch.tokens, batch.prompt_lengths, batch.completion_ids)
    mx.eval(found)
    return found


def _mask(rows: Sequence[Row], cfg: Recipe) -> mx.array:
    """1 on each completion's tokens: `[N, T]`, with nothing in the rows that overlong filtering leaves out."""
    completions = [rollout.completion for _, rollout in rows]
    filtered = cfg.loss.mask_truncated_completions
    lengths = [0 if filtered and c.finish_reason != "stop" else len(c.token_ids) for c in completions]
    return _mask_of(lengths, max(len(c.token_ids) for c in completions))


def _mask_of(lengths: Sequence[int], width: int | None = None) -> mx.array:
    """1 on the first so many columns of each row: `[N, width]` float32, as wide as the longest unless said."""
    return (mx.arange(width or max(lengths))[None] < mx.array(list(lengths))[:, None]).astype(mx.float32)


def _sampled(rollout: Rollout) -> list[float]:
    assert rollout.completion.logprobs is not None, "training needs rollouts with logprobs"
    return list(rollout.completion.logprobs)


def _drawn(rows: Sequence[Row], length: int) -> mx.array | None:
    """The logprobs of the filtered distribution, if there was one: `[B, T]`."""
    drawn = [rollout.completion.sampler_logprobs for _, rollout in rows]
    return mx.array(_padded([list(values or ()) for values in drawn], length, 0.0)) if all(drawn) else None


def _padded(rows: list[list[Value]], length: int, filler: Value) -> list[list[Value]]:
    return [row + [filler] * (length - len(row)) for row in rows]


def _fitted(values: mx.array, length: int) -> mx.array:
    """`[B, T]` cut or padded with 0 to `length`; what is cut lies behind the rows' ends."""
    return mx.pad(values[:, :length], [(0, 0), (0, max(0, length - values.shape[1]))])


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
