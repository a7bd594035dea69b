"""Groups become batches: padded arrays whose token weights are fixed before the split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

import mlx.core as mx

from grpo.config import Recipe
from grpo.model.policy import Policy
from grpo.objective import token_weights, weights_of_chosen
from grpo.objective.masks import top_entropy_mask
from grpo.training.packing import Packing, Row, Shape, pack, pack_in_order
from grpo.types import Batch, Group, Rollout, Totals, Trajectory

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
    totals = Totals(len(rows), sum(_counted(rollout, cfg) for _, rollout in rows))
    learning = [row for row in rows if learns(row[1], cfg)]
    if not learning:
        return []
    batches = [collate([learning[i] for i in part], shape) for part, shape in pack(learning, Packing.of(cfg, parts))]
    return _with_token_weights(batches, totals, cfg)


def with_reference(batches: Sequence[Batch], policy: Policy, beta: float, cfg: Recipe) -> MiniBatch:
    """The same batches with the reference's logprobs and the penalty's weight; as they are where the loss has none."""
    if beta == 0 or cfg.loss.kl_in != "loss":
        return list(batches)
    with policy.use("reference"):
        return [replace(batch, reference=forced(policy, batch)[0], beta=mx.array(beta)) for batch in batches]


def with_anchor(minibatches: Sequence[MiniBatch], policy: Policy, cfg: Recipe) -> list[MiniBatch]:
    """The same minibatches with the policy's logprobs as it is now, before the step's first update.

    The first minibatch needs none: its logprobs when it is reached are these, unless its update drops numbers of the
    adapter's inputs. Then each has the entropies of the same pass too: those that the update sees are another policy's.
    """
    if cfg.adapter.dropout > 0:
        return [[_whole(policy, batch) for batch in batches] for batches in minibatches]
    others = [[replace(b, anchor=forced(policy, b)[0]) for b in batches] for batches in minibatches[1:]]
    return [*minibatches[:1], *others]


def _whole(policy: Policy, batch: Batch) -> Batch:
    logprobs, entropies = forced(policy, batch)
    return replace(batch, anchor=logprobs, entropies=entropies)


def with_top_entropy(minibatches: Sequence[MiniBatch], policy: Policy, cfg: Recipe) -> list[MiniBatch]:
    """The same minibatches with weight only on the step's tokens of highest entropy.

    The number of completions that a denominator counts stays the one of `make_batches`. The masks stay too: what is
    measured of a whole completion (its ratio, say) is measured of all its tokens.
    """
    everything = [batch for batches in minibatches for batch in batches]
    if cfg.loss.top_entropy_quantile == 1 or not everything:
        return list(minibatches)
    entropies = mx.concatenate([forced(policy, batch)[1].reshape(-1) for batch in everything])
    trained = mx.concatenate([batch.trained.reshape(-1) for batch in everything])
    ends = list(accumulate(batch.trained.size for batch in everything))
    parts = mx.split(top_entropy_mask(entropies, trained, cfg.loss.top_entropy_quantile), ends[:-1])
    chosen = iter(part.reshape(batch.trained.shape) for part, batch in zip(parts, everything, strict=True))
    return [_with_weights(batches, [next(chosen) for _ in batches], cfg) for batches in minibatches]


def _with_weights(batches: MiniBatch, chosen: Sequence[mx.array], cfg: Recipe) -> MiniBatch:
    """A minibatch with weight on the tokens alone that were chosen of each batch, `[B, T]`."""
    moved = weights_of_chosen([batch.weights for batch in batches], chosen, cfg.loss)
    return [replace(batch, weights=weights) for batch, weights in zip(batches, moved, strict=True)]


def _with_token_weights(batches: Sequence[Batch], totals: Totals, cfg: Recipe) -> MiniBatch:
    """A minibatch with the weights that its loss is averaged by."""
    longest, parts = cfg.rollout.max_completion_length, len(batches) if _local(cfg) else 1
    return [replace(b, weights=token_weights(b.trained, totals, cfg.loss, longest) / parts) for b in batches]


def whole_batches(groups: Sequence[Group], cfg: Recipe) -> Iterator[tuple[list[Row], Batch]]:
    """All rows of the groups in their order, as micro-batches to be looked at rather than learnt from."""
    return row_batches(rows_of(groups), cfg)


def row_batches(rows: Sequence[Row], cfg: Recipe) -> Iterator[tuple[list[Row], Batch]]:
    """Rows in their order, as micro-batches to be looked at, each with its rows.

    Rows of padding may follow those of a micro-batch; nothing of them is trained.
    """
    for positions, shape in pack_in_order(rows, Packing.of(cfg)):
        part = [rows[i] for i in positions]
        yield part, collate(part, shape)


def rows_of(groups: Sequence[Group]) -> list[Row]:
    """Every completion of the groups with its task, in their order."""
    return [(group.task, rollout) for group in groups for rollout in group.rollouts]


def collate(rows: Sequence[Row], shape: Shape) -> Batch:
    """Rows as one batch of a shape, in which every trained token weighs 1."""
    prompts = list(dict.fromkeys(task.prompt_ids for task, _ in rows))
    place = {prompt: position for position, prompt in enumerate(prompts)}
    fill = shape.rows - len(rows)
    trajectories = [rollout.trajectory for _, rollout in rows]
    lengths = [len(prompt) for prompt in prompts] + [1] * (shape.prompts - len(prompts))
    trained, behaviour = _trained(trajectories, shape), _column([t.behaviour for t in trajectories], shape)
    assert behaviour is not None, "training needs rollouts with logprobs"
    advantages = mx.array([rollout.advantage for _, rollout in rows] + [0.0] * fill)
    return Batch(
        prompt_ids=mx.array(_padded(prompts, shape.prompts, shape.prompt_length, 0)),
        prompt_lengths=mx.array(lengths),
        prompt_index=mx.array([place[task.prompt_ids] for task, _ in rows] + [0] * fill),
        token_ids=mx.array(_padded([t.token_ids for t in trajectories], shape.rows, shape.length, 0)),
        trained=trained,
        weights=trained,
        advantages=mx.where(trained > 0, advantages[:, None], 0.0),
        behaviour=behaviour,
        sampler=_column([t.sampler for t in trajectories], shape),
    )


def learns(rollout: Rollout, cfg: Recipe) -> bool:
    """Whether a completion goes through the update, or can have no gradient there."""
    return _counted(rollout, cfg) > 0 and (rollout.advantage != 0 or _all_rows_count(cfg))


def _counted(rollout: Rollout, cfg: Recipe) -> int:
    """How many of its tokens may be trained on: none of what overlong filtering leaves out."""
    cut = rollout.trajectory.finish_reason != "stop"
    return 0 if cut and cfg.loss.mask_truncated_completions else rollout.trajectory.trained_tokens


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


def batch_logprobs(policy: Policy, batch: Batch, entropy_gradient: bool = False) -> tuple[mx.array, mx.array]:
    """Logprobs and entropies of a batch's tokens under the active state, `[B, T]` each."""
    return policy.group_logprobs(
        batch.prompt_ids, batch.prompt_lengths, batch.prompt_index, batch.token_ids, entropy_gradient
    )


def _trained(trajectories: Sequence[Trajectory], shape: Shape) -> mx.array:
    """1 on trained tokens, 0 on others and on padding: `[B, T]` float32."""
    if all(all(trajectory.trained) for trajectory in trajectories):  # then lengths say it, without a value for each
        lengths = mx.array([len(t.token_ids) for t in trajectories] + [0] * (shape.rows - len(trajectories)))
        return (mx.arange(shape.length)[None] < lengths[:, None]).astype(mx.float32)
    masks = [[float(trained) for trained in trajectory.trained] for trajectory in trajectories]
    return mx.array(_padded(masks, shape.rows, shape.length, 0.0))


def _column(values: Sequence[tuple[float, ...] | None], shape: Shape) -> mx.array | None:
    """A column of the rows, `[B, T]` float32; None unless every row has it."""
    known = [row for row in values if row is not None]
    return None if len(known) < len(values) else mx.array(_padded(known, shape.rows, shape.length, 0.0))


def _padded(values: Sequence[Sequence[Value]], rows: int, length: int, filler: Value) -> list[list[Value]]:
    """Rows of a length each, and as many rows as there are to be."""
    filled = [list(row) + [filler] * (length - len(row)) for row in values]
    return filled + [[filler] * length for _ in range(rows - len(values))]
