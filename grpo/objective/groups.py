"""Rewards and advantages for groups of rollouts: the arrays' maths applied to what flows between rooms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from grpo.config import AdvantageConfig
from grpo.objective.advantages import advantages, total_rewards, turn_advantages
from grpo.presets import Preset
from grpo.types import Group, Rollout

Weights = Mapping[str, float]
"""The weight of each reward by its name, environments' own included."""


def with_rewards(groups: Sequence[Group], weights: Weights) -> list[Group]:
    """The same groups with `reward` in their rollouts. Raises KeyError for a score without a weight."""
    totals: Any = total_rewards(*_scores(groups, weights)).tolist()
    return _changed(groups, (replace(r, reward=None if math.isnan(t) else t) for r, t in _zipped(groups, totals)))


def with_advantages(groups: Sequence[Group], weights: Weights, cfg: AdvantageConfig, preset: Preset) -> list[Group]:
    """The same groups with `advantage` in their rollouts, and with `advantage.turns: turn` `turn_advantages`.

    All groups have the same size. `preset` is the loss's, for what `cfg` leaves open. Penalties count as one more
    reward, of weight -1, for the completions that some reward scored.
    """
    if cfg.turns == "turn":
        return _with_turn_advantages(groups, weights, cfg, preset)
    scores_NF, weights_F = _penalised(*_scores(groups, weights), groups)
    values: Any = advantages(scores_NF, weights_F, len(groups[0].rollouts), cfg, preset).tolist()
    return _changed(groups, (replace(r, advantage=value) for r, value in _zipped(groups, values)))


def has_variance(group: Group, turns_by: Weights | None = None) -> bool:
    """Whether the group's rewards differ, so that it teaches something.

    `turns_by` are the weights where advantages are of turns: then the rewards of turns are what must differ.
    """
    if turns_by is None:
        return len({rollout.reward for rollout in group.rollouts if rollout.reward is not None}) > 1
    rewards_NT = turn_rewards([group], turns_by)
    return len({reward for row in rewards_NT for reward in row if not math.isnan(reward)}) > 1


def turn_rewards(groups: Sequence[Group], weights: Weights) -> list[list[float]]:
    """The rewards of each completion's turns, weighed; NaN for a turn without one.

    A turn has what its environment's steps gave for it. The last turn has the outcome besides, if there is any: the
    weighted sum of all other rewards, what `get_reward` returned among them, less the penalty. It is 0 if the
    completion has a score, though none of its turns has a reward (`grpo.scoring.own`). A completion that failed, or
    that nothing scored, has no rewards.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores_NF, weights_F = _scores(groups, weights)
    total: Any = total_rewards(scores_NF, weights_F).tolist()
    outcomes: Any = total_rewards(_outcomes(scores_NF, rollouts), weights_F).tolist()
    return [
        _of_turns(rollout, weights, outcome, scored=not math.isnan(whole))
        for rollout, whole, outcome in zip(rollouts, total, outcomes, strict=True)
    ]


def _with_turn_advantages(
    groups: Sequence[Group], weights: Weights, cfg: AdvantageConfig, preset: Preset
) -> list[Group]:
    rewards_NT, n = turn_rewards(groups, weights), len(groups[0].rollouts)
    longest = max(1, *map(len, rewards_NT))
    padded = mx.array([row + [math.nan] * (longest - len(row)) for row in rewards_NT])
    values: Any = turn_advantages(padded.reshape(-1, n, longest), cfg, preset).reshape(-1, longest).tolist()
    turns = [tuple(value[: len(row)]) for value, row in zip(values, rewards_NT, strict=True)]
    rollouts = (rollout for group in groups for rollout in group.rollouts)
    changed = (
        replace(rollout, advantage=own[0] if own else 0.0, turn_advantages=own)
        for rollout, own in zip(rollouts, turns, strict=True)
    )
    return _changed(groups, changed)


def _of_turns(rollout: Rollout, weights: Weights, outcome: float, scored: bool) -> list[float]:
    """The rewards of a completion's turns. `outcome` is without the penalty, and NaN for none.

    Raises ValueError for a conversation with rewards for other turns.
    """
    conversation, count = rollout.trajectory.conversation, rollout.trajectory.turns
    given = () if conversation is None else conversation.turn_rewards
    if given and len(given) != count:
        raise ValueError(f"a conversation has rewards for {len(given)} turns, and its tokens are of {count}")
    if not scored or count == 0:
        return [math.nan] * count
    weight = 0.0 if conversation is None else weights.get(conversation.environment, 0.0)
    rewards = [weight * reward if reward is not None and weight else math.nan for reward in given or [None] * count]
    penalties = [-rollout.penalty] if rollout.penalty else []
    known = [reward for reward in (outcome, *penalties, rewards[-1]) if not math.isnan(reward)]
    nothing = not known and not all(map(math.isnan, rewards))  # or the sum of none, 0, is what the completion scored
    return [*rewards[:-1], math.nan if nothing else sum(known)]


def _outcomes(scores_NF: mx.array, rollouts: Sequence[Rollout]) -> mx.array:
    """The scores without the rewards of turns: of an environment's own, what `get_reward` returned."""
    rows: Any = scores_NF.tolist()
    names = list(rollouts[0].scores)
    for row, rollout in zip(rows, rollouts, strict=True):
        conversation = rollout.trajectory.conversation
        if conversation is not None and conversation.environment in names:
            outcome = conversation.outcome
            row[names.index(conversation.environment)] = math.nan if outcome is None else outcome
    return mx.array(rows)


def _penalised(scores_NF: mx.array, weights_F: mx.array, groups: Sequence[Group]) -> tuple[mx.array, mx.array]:
    """Scores and weights with the penalties, if there are any: one more reward, of weight -1, of the completions that
    have a score that counts."""
    penalties = [r.penalty for group in groups for r in group.rollouts]
    if any(penalties):
        scored = ~mx.isnan(total_rewards(scores_NF, weights_F))
        scores_NF = mx.concatenate([scores_NF, mx.where(scored, mx.array(penalties), mx.nan)[:, None]], axis=1)
        weights_F = mx.concatenate([weights_F, mx.array([-1.0])])
    return scores_NF, weights_F


def _scores(groups: Sequence[Group], weights: Weights) -> tuple[mx.array, mx.array]:
    """Scores `[N, F]`, NaN for none, and weights `[F]`. Where a function or the environment failed, no score counts:
    the sum would not be the others'."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    names = list(rollouts[0].scores) if rollouts else list(weights)
    scores = [[math.nan if r.scores[name] is None or r.failed else r.scores[name] for name in names] for r in rollouts]
    return mx.array(scores), mx.array([float(weights[name]) for name in names])


def _zipped(groups: Sequence[Group], values: Sequence[float]) -> Iterator[tuple[Rollout, float]]:
    return zip((rollout for group in groups for rollout in group.rollouts), values, strict=True)


def _changed(groups: Sequence[Group], rollouts: Iterator[Rollout]) -> list[Group]:
    return [replace(group, rollouts=tuple(next(rollouts) for _ in group.rollouts)) for group in groups]
