"""Groups become batches: padded arrays whose token weights are fixed before the split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeVar

import mlx.core as mx

from grpo.config import Recipe
from grpo.model.policy import Policy
from grpo.objective import token_weights, weights_of_chosen
from grpo.objective.masks import top_entropy_mask
from grpo.training.packing import Packing, Row, Shape, pack, pack_in_order
from grpo.types import Batch, Group, Rollout

MiniBatch = list[Batch]
Value = TypeVar("Value", int, float)


def make_minibatches(groups: Sequence[Group], cfg: Recipe, parts: int = 1) -> list[MiniBatch]:
    """The step's groups as `optim.num_minibatches` minibatches, one for each update of a pass.

    Each is of at least `parts` micro-batches, for as many processes to share.
    """
    size = -(-len(groups) // cfg.optim.num_minibatches)
    return [make_batches(groups[start : start + size], cfg, parts) for start in range(0, len(groups), size)]


def make_batches(groups: Sequence[Group], cfg: Recipe, parts: int = 1) -> MiniBatch:
    """The groups' rows as micro-batches of up to `optim.micro_batch_tokens`.

    Rows that can have no gradient (advantage 0 and nothing else in the loss, or no tokens) are left out. Denominators
    count them, so that leaving them out changes nothing.
    """
    rows = rows_of(groups)
    mask = _mask(rows, cfg)
    weights = token_weights(mask, cfg.loss, cfg.rollout.max_completion_length)
    learning = [i for i, (_, rollout) in enumerate(rows) if learns(rollout, cfg)]
    if not learning:
        return []
    packed = pack([rows[i] for i in learning], Packing.of(cfg.rollout, cfg.optim, parts))
    taken = [([learning[position] for position in part], shape) for part, shape in packed]
    batches = [collate([rows[i] for i in p], mask[mx.array(p)], weights[mx.array(p)], shape) for p, shape in taken]
    return _with_local_weights(batches, cfg) if _local(cfg) else batches


def with_reference(batches: Sequence[Batch], policy: Policy, beta: float, cfg: Recipe) -> MiniBatch:
    """The same batches with the reference's logprobs and the penalty's weight; as they are where the loss has none."""
    if beta == 0 or cfg.loss.kl_in != "loss":
        return list(batches)
    with policy.use("reference"):
        return [replace(batch, ref_logprobs=forced(policy, batch)[0], beta=mx.array(beta)) for batch in batches]


def with_old_logprobs(minibatches: Sequence[MiniBatch], policy: Policy, cfg: Recipe) -> list[MiniBatch]:
    """The same minibatches with the policy's logprobs as it is now, before the step's first update.

    The first minibatch needs none: its logprobs when it is reached are these, unless its update drops numbers of the
    adapter's inputs. Then each has the entropies of the same pass too: those that the update sees are another policy's.
    """
    if cfg.adapter.dropout > 0:
        return [[_whole(policy, batch) for batch in batches] for batches in minibatches]
    others = [[replace(b, old_logprobs=forced(policy, b)[0]) for b in batches] for batches in minibatches[1:]]
    return [*minibatches[:1], *others]


def _whole(policy: Policy, batch: Batch) -> Batch:
    logprobs, entropies = forced(policy, batch)
    return replace(batch, old_logprobs=logprobs, entropies=entropies)


def with_top_entropy(minibatches: Sequence[MiniBatch], policy: Policy, cfg: Recipe) -> list[MiniBatch]:
    """The same minibatches with weight only on the step's tokens of highest entropy.

    The number of completions that a denominator counts stays the one of `make_batches`. The masks stay too: what is
    measured of a whole completion (its ratio, say) is measured of all its tokens.
    """
    everything = [batch for batches in minibatches for batch in batches]
    if cfg.loss.top_entropy_quantile == 1 or not everything:
        return list(minibatches)
    entropies = mx.concatenate([forced(policy, batch)[1].reshape(-1) for batch in everything])
    mask = mx.concatenate([batch.mask.reshape(-1) for batch in everything])
    ends = list(accumulate(batch.mask.size for batch in everything))
    parts = mx.split(top_entropy_mask(entropies, mask, cfg.loss.top_entropy_quantile), ends[:-1])
    chosen = iter(part.reshape(batch.mask.shape) for part, batch in zip(parts, everything, strict=True))
    return [_with_weights(batches, [next(chosen) for _ in batches], cfg) for batches in minibatches]


def _with_weights(batches: MiniBatch, chosen: Sequence[mx.array], cfg: Recipe) -> MiniBatch:
    """A minibatch with weight on the tokens alone that were chosen of each batch, `[B, T]`."""
    moved = weights_of_chosen([batch.weights for batch in batches], chosen, cfg.loss)
    return [replace(batch, weights=weights) for batch, weights in zip(batches, moved, strict=True)]


def _with_local_weights(batches: MiniBatch, cfg: Recipe) -> MiniBatch:
    """A minibatch with each micro-batch's weights from its own mask."""
    longest = cfg.rollout.max_completion_length
    return [replace(b, weights=token_weights(b.mask, cfg.loss, longest) / len(batches)) for b in batches]


def whole_batches(groups: Sequence[Group], cfg: Recipe) -> Iterator[Batch]:
    """All rows of the groups in their order, as micro-batches to be looked at rather than learnt from."""
    return row_batches(rows_of(groups), cfg)


def row_batches(rows: Sequence[Row], cfg: Recipe) -> Iterator[Batch]:
    """Rows in their order, as micro-batches to be looked at.

    Rows of padding may follow those of a micro-batch; their mask is 0.
    """
    for positions, shape in pack_in_order(rows, Packing.of(cfg.rollout, cfg.optim)):
        part = [rows[i] for i in positions]
        mask = _mask_of([len(rollout.completion.token_ids) for _, rollout in part])
        yield collate(part, mask, mask, shape)


def rows_of(groups: Sequence[Group]) -> list[Row]:
    """Every completion of the groups with its task, in their order."""
    return [(group.task, rollout) for group in groups for rollout in group.rollouts]


def collate(rows: Sequence[Row], mask: mx.array, weights: mx.array, shape: Shape) -> Batch:
    """Rows as one batch of a shape; mask and weights `[≤ B, T]` are fitted to it."""
    prompts = list(dict.fromkeys(task.prompt_ids for task, _ in rows))
    place = {prompt: position for position, prompt in enumerate(prompts)}
    fill = shape.rows - len(rows)
    completions = [list(rollout.completion.token_ids) for _, rollout in rows] + [[]] * fill
    sampled = [_sampled(rollout) for _, rollout in rows] + [[]] * fill
    lengths = [len(prompt) for prompt in prompts] + [1] * (shape.prompts - len(prompts))
    ids = [list(prompt) for prompt in prompts] + [[]] * (shape.prompts - len(prompts))
    return Batch(
        prompt_ids=mx.array(_padded(ids, shape.prompt_length, 0)),
        prompt_lengths=mx.array(lengths),
        prompt_index=mx.array([place[task.prompt_ids] for task, _ in rows] + [0] * fill),
        completion_ids=mx.array(_padded(completions, shape.length, 0)),
        mask=_fitted(mask, shape.length, fill),
        advantages=mx.array([rollout.advantage for _, rollout in rows] + [0.0] * fill),
        weights=_fitted(weights, shape.length, fill),
        sampling_logprobs=mx.array(_padded(sampled, shape.length, 0.0)),
        sampler_logprobs=_drawn(rows, fill, shape.length),
    )


def learns(rollout: Rollout, cfg: Recipe) -> bool:
    """Whether a completion goes through the update, or can have no gradient there."""
    return _trained_length(rollout, cfg) > 0 and (rollout.advantage != 0 or _all_rows_count(cfg))


def _trained_length(rollout: Rollout, cfg: Recipe) -> int:
    """How many of its tokens may be trained on: none of what overlong filtering leaves out."""
    cut = rollout.completion.finish_reason != "stop"
    return 0 if cut and cfg.loss.mask_truncated_completions else len(rollout.completion.token_ids)


def _all_rows_count(cfg: Recipe) -> bool:
    """Whether a row without advantage may have a gradient, or a say in which tokens or how many are trained on."""
    loss = cfg.loss
    chosen = loss.top_entropy_quantile < 1 or _local(cfg)
    squared = loss.preset.surrogate == "dppo" and loss.dppo_penalty > 0  # it does not know advantages
    penalised = loss.kl_in == "loss" and (loss.beta > 0 or bool(loss.beta_end))
    return penalised or chosen or squared or loss.entropy_coef > 0 or loss.use is not None


def _local(cfg: Recipe) -> bool:
    return cfg.loss.preset.normalize == "micro_batch"


def forced(policy: Policy, batch: Batch) -> tuple[mx.array, mx.array]:
    """Logprobs and entropies under the active state, evaluated while it is active."""
    found = batch_logprobs(policy, batch)
    mx.eval(found)
    return found


def batch_logprobs(policy: Policy, batch: Any, entropy_gradient: bool = False) -> tuple[mx.array, mx.array]:
    """Logprobs and entropies of a batch's completions under the active state, `[B, T]` each."""
    return policy.group_logprobs(
        batch.prompt_ids, batch.prompt_lengths, batch.prompt_index, batch.completion_ids, entropy_gradient
    )


def _mask(rows: Sequence[Row], cfg: Recipe) -> mx.array:
    """1 on each completion's tokens: `[N, T]`, with nothing in the rows that overlong filtering leaves out."""
    width = max(len(rollout.completion.token_ids) for _, rollout in rows)
    return _mask_of([_trained_length(rollout, cfg) for _, rollout in rows], width)


def _mask_of(lengths: Sequence[int], width: int | None = None) -> mx.array:
    """1 on the first so many columns of each row: `[N, width]` float32, as wide as the longest unless said."""
    return (mx.arange(width or max(lengths))[None] < mx.array(list(lengths))[:, None]).astype(mx.float32)


def _sampled(rollout: Rollout) -> list[float]:
    assert rollout.completion.logprobs is not None, "training needs rollouts with logprobs"
    return list(rollout.completion.logprobs)


def _drawn(rows: Sequence[Row], fill: int, length: int) -> mx.array | None:
    """The logprobs of the filtered distribution, if there was one, and `fill` rows of padding: `[B, T]`."""
    drawn = [list(rollout.completion.sampler_logprobs or ()) for _, rollout in rows]
    return mx.array(_padded(drawn + [[]] * fill, length, 0.0)) if all(drawn) else None


def _padded(rows: list[list[Value]], length: int, filler: Value) -> list[list[Value]]:
    return [row + [filler] * (length - len(row)) for row in rows]


def _fitted(values: mx.array, length: int, rows: int = 0) -> mx.array:
    """`[B, T]` cut or padded with 0 to `length`, and `rows` more of them; what is cut lies behind the rows' ends."""
    return mx.pad(values[:, :length], [(0, rows), (0, max(0, length - values.shape[1]))])
