"""Turns groups into batches: padded arrays, whose token weights are fixed before the split into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from grpo.backend.lanes import side_by_side
from grpo.backend.ranks import Ranks
from grpo.config import LossConfig
from grpo.model.lines import Lines, laid_out
from grpo.model.policy import Policy
from grpo.objective import token_weights
from grpo.training.lanes import tokens_of, update_lanes
from grpo.training.packing import Packing, Sample, Shape, pack
from grpo.types import SAMPLER, Batch, Group, Rollout, Totals, Trajectory, Value

MiniBatch = list[Batch]
Found = TypeVar("Found")


def make_minibatches(
    groups: Sequence[Group], loss: LossConfig, packing: Packing, longest: int, number: int = 1, beta: float = 0.0
) -> list[MiniBatch]:
    """Distribute the step's groups over `number` minibatches, one for each update of an iteration. See `make_batches`.

    In a step, groups with a signal come first, then groups without, then replayed ones. Groups are dealt to the
    minibatches in turn, so each update gets about its share of every kind.
    """
    groups = _with_samplers(groups)
    return [
        make_batches(groups[first::number], loss, packing, longest, beta) for first in range(min(number, len(groups)))
    ]


def make_batches(
    groups: Sequence[Group], loss: LossConfig, packing: Packing, longest: int, beta: float = 0.0
) -> MiniBatch:
    """Make the micro-batches of one update, with the token weights that normalize the loss.

    `longest` is the limit on a completion's tokens, which the `constant` normalizer divides by; `beta` is the weight of
    the KL penalty at this step. A completion counts once, however many rows it has (`rows_of`). Rows that cannot have a
    gradient (no trained tokens, or advantage 0 and no other term in the loss) are left out. The denominators still
    count them, so the gradient stays the same.
    """
    groups = _with_samplers(groups)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    totals = Totals(len(rollouts), sum(_counted(rollout, loss) for rollout in rollouts))
    whole = [rollout.trajectory.trained_tokens for rollout in rollouts for _ in rollout.trajectory.parts]
    rows = [(row, length) for row, length in zip(rows_of(groups), whole, strict=True) if learns(row[1], loss)]
    if not rows:
        return []
    packed = pack([row for row, _ in rows], packing)
    batches = [collate([rows[i][0] for i in part], shape) for part, shape in packed]
    lengths = [mx.array([rows[i][1] for i in part] + [0] * (shape.rows - len(part))) for part, shape in packed]
    penalty = mx.array(beta) if beta != 0 and loss.kl_in == "loss" else None
    parts = len(batches) if loss.preset.normalize == "micro_batch" else 1
    weights = (
        token_weights(batch.trained, totals, loss, longest, of_completion) / parts
        for batch, of_completion in zip(batches, lengths, strict=True)
    )
    return [replace(batch, weights=weight, beta=penalty) for batch, weight in zip(batches, weights, strict=True)]


def useful_tokens(
    groups: Sequence[Group], minibatches: Sequence[MiniBatch], loss: LossConfig, shares: bool
) -> dict[str, float]:
    """The metric `update/useful_tokens`: the share of real tokens among the tokens that go through the model in an
    iteration of the update. Padding and repeated prompts are not real: a prompt counts once. Empty without tokens."""
    through = sum(_places(batch, shares) for batches in minibatches for batch in batches)
    rows = [(task, rollout) for task, rollout in rows_of(groups) if learns(rollout, loss)]
    real = sum(len(rollout.trajectory.token_ids) for _, rollout in rows)
    real += sum(map(len, {task.prompt_ids for task, _ in rows}))
    return {"update/useful_tokens": real / through} if through else {}


def _places(batch: Batch, shares: bool) -> int:
    """The tokens of a batch that go through the model, padding included."""
    if batch.lines is not None:
        return batch.lines[0].size
    (rows, length), (prompts, before) = batch.token_ids.shape, batch.prompt_ids.shape
    return rows * length + (prompts if shares else rows) * before


def by_row(
    rows: Sequence[Sample], packing: Packing, measure: Callable[[Batch], mx.array], ranks: Ranks | None = None
) -> list[Any]:
    """A measurement of each row by forward passes: `measure` of a micro-batch returns an array with one value, or one
    list of values, for each row.

    The ranks divide the micro-batches among themselves, and every rank gets all values.
    """
    ranks, parts = ranks or Ranks(), pack(rows, packing)
    mine: list[Any] = [measure(collate([rows[i] for i in part], shape)).tolist() for part, shape in ranks.share(parts)]
    found: list[Any] = [None] * len(rows)
    for (part, _), values in zip(parts, ranks.merge(mine), strict=True):
        for position, value in zip(part, values, strict=False):  # rows of padding may follow
            found[position] = value
    return found


def rows_of(groups: Sequence[Group]) -> list[Sample]:
    """Every row to train on with its task, in the order of the groups: a completion, or each of its `parts`.

    A conversation that continued in new rows has several parts.
    """
    return [(group.task, row) for group in groups for rollout in group.rollouts for row in _parts(rollout)]


def of_completions(groups: Sequence[Group], values: Sequence[Value]) -> list[list[Value]]:
    """Group values of `rows_of(groups)`, one for each row, by completion."""
    each = iter(values)
    return [[next(each) for _ in r.trajectory.parts] for group in groups for r in group.rollouts]


def _parts(rollout: Rollout) -> Iterator[Rollout]:
    """A completion's rows. Each has the completion's advantage, or the advantages of its own turns."""
    if not rollout.trajectory.begins:
        yield rollout
        return
    turns, begun = rollout.turn_advantages, 0
    for part in rollout.trajectory.parts:
        end = begun + (0 if turns is None else part.turns)
        yield replace(rollout, trajectory=part, turn_advantages=None if turns is None else turns[begun:end])
        begun = end


def collate(rows: Sequence[Sample], shape: Shape) -> Batch:
    """Pad rows to one batch of the given shape, in packed lines if the shape has lines. Trained tokens get weight 1."""
    prompts = list(dict.fromkeys(task.prompt_ids for task, _ in rows))
    place = {prompt: position for position, prompt in enumerate(prompts)}
    fill = shape.rows - len(rows)
    trajectories = [rollout.trajectory for _, rollout in rows]
    lengths = [len(prompt) for prompt in prompts] + [1] * (shape.prompts - len(prompts))
    trained, behaviour = _trained(trajectories, shape), _column([t.behaviour for t in trajectories], shape)
    assert behaviour is not None, "training needs rollouts with logprobs"
    lines, starts = None, None
    if shape.lines:
        ids = [(task.prompt_ids, rollout.trajectory.token_ids) for task, rollout in rows]
        lines, begun = laid_out(ids, shape.lines, shape.width, shape.alone)
        starts = mx.array(begun + [0] * fill)
    return Batch(
        prompt_ids=_padded(prompts, shape.prompts, shape.prompt_length, np.int32),
        prompt_lengths=mx.array(lengths),
        prompt_index=mx.array([place[task.prompt_ids] for task, _ in rows] + [0] * fill),
        token_ids=_padded([t.token_ids for t in trajectories], shape.rows, shape.length, np.int32),
        trained=trained,
        weights=trained,
        advantages=mx.where(trained > 0, _advantages([rollout for _, rollout in rows], shape), 0.0),
        behaviour=behaviour,
        sampler=_column([t.sampler for t in trajectories], shape),
        stale=_stale([rollout for _, rollout in rows], trained),
        lines=lines,
        starts=starts,
    )


def learns(rollout: Rollout, loss: LossConfig) -> bool:
    """Whether a completion can contribute to the gradient, so that the update needs it."""
    return _counted(rollout, loss) > 0 and (rollout.has_advantage or rollout.taught or _all_rows_count(loss))


def _counted(rollout: Rollout, loss: LossConfig) -> int:
    """The number of tokens to train on: 0 for a truncated completion if the loss masks those."""
    masked = loss.mask_truncated_completions and rollout.trajectory.truncated
    return 0 if masked else rollout.trajectory.trained_tokens


def _all_rows_count(loss: LossConfig) -> bool:
    """Whether a row with advantage 0 can still have a gradient, or change the weights of other rows' tokens."""
    kl_penalty = loss.kl_in == "loss" and (loss.beta > 0 or bool(loss.beta_end))
    dppo_penalty = loss.preset.surrogate == "dppo" and loss.dppo_penalty > 0  # independent of advantages
    shared_weights = loss.top_entropy_quantile < 1 or loss.preset.normalize == "micro_batch"
    return kl_penalty or dppo_penalty or shared_weights or loss.entropy_coef > 0 or loss.use is not None


def forced(policy: Policy, batch: Batch) -> mx.array:
    """The logprobs of `batch_logprobs`, evaluated now: the active adapter state may change before they are read.

    Entropies are not computed, which saves a softmax over the vocabulary.
    """
    return forced_each(policy, [batch])[0]


def forced_each(policy: Policy, batches: Sequence[Batch], ranks: Ranks | None = None) -> list[mx.array]:
    """`forced` for each batch. A CPU computes several batches in parallel."""
    return [logprobs for (logprobs,) in _forced(policy, batches, False, ranks)]


def forced_with_entropies(policy: Policy, batch: Batch) -> tuple[mx.array, mx.array]:
    """The logprobs and entropies of `batch_logprobs`, evaluated now."""
    return forced_each_with_entropies(policy, [batch])[0]


def forced_each_with_entropies(
    policy: Policy, batches: Sequence[Batch], ranks: Ranks | None = None
) -> list[tuple[mx.array, mx.array]]:
    """`forced_with_entropies` for each batch. A CPU computes several batches in parallel."""
    return [(logprobs, entropies) for logprobs, entropies in _forced(policy, batches, True, ranks)]


def hidden_each(policy: Policy, batches: Sequence[Batch], ranks: Ranks | None = None) -> list[mx.array]:
    """`batch_hidden` for each batch: `[B, T, D]`, evaluated now. A CPU computes several batches in parallel."""
    return list(_each(policy, batches, lambda batch: batch_hidden(policy, batch), ranks))


def _forced(
    policy: Policy, batches: Sequence[Batch], entropies: bool, ranks: Ranks | None
) -> Iterator[tuple[mx.array, ...]]:
    return _each(policy, batches, lambda batch: batch_logprobs(policy, batch, entropies=entropies), ranks)


def _each(
    policy: Policy, batches: Sequence[Batch], measure: Callable[[Batch], Found], ranks: Ranks | None
) -> Iterator[Found]:
    def of(arrays: dict[str, mx.array]) -> Found:
        return measure(Batch.of(arrays))

    arrays = [batch.arrays() for batch in batches]
    tokens = max(map(tokens_of, arrays), default=0)
    number = update_lanes(policy.model, tokens, len(batches), ranks)
    return side_by_side(of, arrays, number, policy.model.state)


def batch_logprobs(
    policy: Policy, batch: Batch, entropy_gradient: bool = False, entropies: bool = True
) -> tuple[mx.array, ...]:
    """Logprobs and entropies (nats) of a batch's tokens under the active adapter state: `[B, T]` float32 each.

    With `entropy_gradient` the entropies are differentiable. Without `entropies` only logprobs are returned.
    """
    if batch.lines is not None and batch.starts is not None:
        length = batch.token_ids.shape[1]
        return policy.line_logprobs(batch.lines, batch.starts, length, entropy_gradient, entropies)
    prompts = batch.prompt_ids, batch.prompt_lengths, batch.prompt_index
    return policy.group_logprobs(*prompts, batch.token_ids, entropy_gradient, entropies)


def batch_hidden(policy: Policy, batch: Batch) -> mx.array:
    """The hidden states that predict a batch's tokens, under the active adapter state: `[B, T, D]`.

    The policy's head must be separable (`Policy.split`). Values after the end of a row are meaningless.
    """
    if batch.lines is None or batch.starts is None:
        return policy.group_hidden(batch.prompt_ids, batch.prompt_lengths, batch.prompt_index, batch.token_ids)
    hidden = policy.line_hidden(Lines(*batch.lines))
    flat = hidden.reshape(-1, hidden.shape[-1])
    places = batch.starts[:, None] + mx.arange(batch.token_ids.shape[1])[None]
    return flat[mx.minimum(places, len(flat) - 1)]


def _with_samplers(groups: Sequence[Group]) -> Sequence[Group]:
    """Give every trajectory the column `sampler` if any has it. For a trajectory without filters it is `behaviour`.

    Otherwise a batch that mixes both kinds would lose the column, and the loss would depend on how rows are packed.
    """
    trajectories = [rollout.trajectory for group in groups for rollout in group.rollouts]
    if len({trajectory.sampler is None for trajectory in trajectories}) < 2:
        return groups
    return [replace(group, rollouts=tuple(map(_with_sampler, group.rollouts))) for group in groups]


def _with_sampler(rollout: Rollout) -> Rollout:
    trajectory = rollout.trajectory
    if trajectory.sampler is not None or trajectory.behaviour is None:
        return rollout
    columns = {**trajectory.columns, SAMPLER: trajectory.behaviour}
    return replace(rollout, trajectory=replace(trajectory, columns=columns))


def _trained(trajectories: Sequence[Trajectory], shape: Shape) -> mx.array:
    """1 on trained tokens, 0 on other tokens and padding: `[B, T]` float32."""
    if all(all(trajectory.trained) for trajectory in trajectories):  # the mask follows from lengths, without lists
        lengths = mx.array([len(t.token_ids) for t in trajectories] + [0] * (shape.rows - len(trajectories)))
        return (mx.arange(shape.length)[None] < lengths[:, None]).astype(mx.float32)
    return _padded([trajectory.trained for trajectory in trajectories], shape.rows, shape.length)


def _stale(rollouts: Sequence[Rollout], trained: mx.array) -> mx.array | None:
    """1 on the trained tokens that an earlier step's policy sampled: `[B, T]` float32; None if there are none."""
    if not any(rollout.lag for rollout in rollouts):
        return None
    older = [float(rollout.lag > 0) for rollout in rollouts]
    return trained * mx.array(older + [0.0] * (len(trained) - len(older)))[:, None]


def _advantages(rollouts: Sequence[Rollout], shape: Shape) -> mx.array:
    """The advantages of the rows' tokens: `[B, 1]` float32, or `[B, T]` if turns have their own advantages."""
    if all(rollout.turn_advantages is None for rollout in rollouts):
        return mx.array([rollout.advantage for rollout in rollouts] + [0.0] * (shape.rows - len(rollouts)))[:, None]
    return _padded([_by_token(rollout) for rollout in rollouts], shape.rows, shape.length)


def _by_token(rollout: Rollout) -> list[float]:
    """A completion's advantage at each of its tokens. Tokens between two turns get that of the earlier turn."""
    turns = rollout.turn_advantages
    if turns is None:
        return [rollout.advantage] * len(rollout.trajectory.token_ids)
    return [turns[begun - 1] if begun else 0.0 for begun in rollout.trajectory.turns_begun]


def _column(values: Sequence[tuple[float, ...] | None], shape: Shape) -> mx.array | None:
    """A column of the rows, `[B, T]` float32; None unless every row has the column."""
    present = [row for row in values if row is not None]
    return None if len(present) < len(values) else _padded(present, shape.rows, shape.length)


def _padded(values: Sequence[Sequence[float]], rows: int, length: int, dtype: type = np.float32) -> mx.array:
    """The values, padded with 0 to `[rows, length]`."""
    filled: Any = np.zeros((rows, length), dtype)
    for row, given in zip(filled, values, strict=False):
        row[: len(given)] = given
    return mx.array(filled)
