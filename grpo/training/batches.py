"""Groups become batches: padded arrays whose token weights are fixed before the split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import mlx.core as mx

from grpo.config import LossConfig
from grpo.model.policy import Policy
from grpo.objective import token_weights
from grpo.training.packing import Packing, Sample, Shape, pack, pack_in_order
from grpo.types import Batch, Group, Rollout, Totals, Trajectory

MiniBatch = list[Batch]
Number = TypeVar("Number", int, float)


def make_minibatches(
    groups: Sequence[Group], loss: LossConfig, packing: Packing, longest: int, number: int = 1, beta: float = 0.0
) -> list[MiniBatch]:
    """The step's groups as `number` minibatches, one for each update of a pass. See `make_batches`."""
    size = -(-len(groups) // number)
    return [
        make_batches(groups[start : start + size], loss, packing, longest, beta)
        for start in range(0, len(groups), size)
    ]


def make_batches(
    groups: Sequence[Group], loss: LossConfig, packing: Packing, longest: int, beta: float = 0.0
) -> MiniBatch:
    """The rows of an update's groups as micro-batches, with the weights that the loss averages by.

    `longest` is the most tokens that a completion can have, for the `constant` normaliser; `beta` the KL penalty's
    weight at this step. Rows that can have no gradient (advantage 0 and nothing else in the loss, or no trained tokens)
    are left out. Denominators count them, so that leaving them out changes nothing.
    """
    rows = rows_of(groups)
    totals = Totals(len(rows), sum(_counted(rollout, loss) for _, rollout in rows))
    learning = [row for row in rows if learns(row[1], loss)]
    if not learning:
        return []
    batches = [collate([learning[i] for i in part], shape) for part, shape in pack(learning, packing)]
    penalty = mx.array(beta) if beta != 0 and loss.kl_in == "loss" else None
    parts = len(batches) if loss.preset.normalize == "micro_batch" else 1
    weights = (token_weights(batch.trained, totals, loss, longest) / parts for batch in batches)
    return [replace(batch, weights=weight, beta=penalty) for batch, weight in zip(batches, weights, strict=True)]


def row_batches(rows: Sequence[Sample], packing: Packing) -> Iterator[tuple[list[Sample], Batch]]:
    """Rows in their order, as micro-batches to be looked at rather than learnt from, each with its rows.

    Rows of padding may follow those of a micro-batch; nothing of them is trained.
    """
    for positions, shape in pack_in_order(rows, packing):
        part = [rows[i] for i in positions]
        yield part, collate(part, shape)


def rows_of(groups: Sequence[Group]) -> list[Sample]:
    """Every completion of the groups with its task, in their order."""
    return [(group.task, rollout) for group in groups for rollout in group.rollouts]


def collate(rows: Sequence[Sample], shape: Shape) -> Batch:
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


def learns(rollout: Rollout, loss: LossConfig) -> bool:
    """Whether a completion goes through the update, or can have no gradient there."""
    return _counted(rollout, loss) > 0 and (rollout.advantage != 0 or _all_rows_count(loss))


def _counted(rollout: Rollout, loss: LossConfig) -> int:
    """How many of its tokens may be trained on: none of what overlong filtering leaves out."""
    cut = rollout.trajectory.finish_reason != "stop"
    return 0 if cut and loss.mask_truncated_completions else rollout.trajectory.trained_tokens


def _all_rows_count(loss: LossConfig) -> bool:
    """Whether a row without advantage may have a gradient, or a say in which tokens or how many are trained on."""
    chosen = loss.top_entropy_quantile < 1 or loss.preset.normalize == "micro_batch"
    squared = loss.preset.surrogate == "dppo" and loss.dppo_penalty > 0  # it does not know advantages
    penalised = loss.kl_in == "loss" and (loss.beta > 0 or bool(loss.beta_end))
    return penalised or chosen or squared or loss.entropy_coef > 0 or loss.use is not None


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


def _padded(values: Sequence[Sequence[Number]], rows: int, length: int, filler: Number) -> list[list[Number]]:
    """Rows of a length each, and as many rows as there are to be."""
    filled = [list(row) + [filler] * (length - len(row)) for row in values]
    return filled + [[filler] * length for _ in range(rows - len(values))]
