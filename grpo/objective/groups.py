"""Rewards and advantages for groups of rollouts: applies `grpo.objective.advantages` to the types of `grpo.types`."""

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
"""The weight of each reward by its name, including the environments' own rewards."""


def with_rewards(groups: Sequence[Group], weights: Weights) -> list[Group]:
    """The same groups, with `reward` set in their rollouts. Raises KeyError for a score without a weight."""
    totals: Any = total_rewards(*_scores(groups, weights)).tolist()
    return _changed(groups, (replace(r, reward=None if math.isnan(t) else t) for r, t in _zipped(groups, totals)))


def with_advantages(groups: Sequence[Group], weights: Weights, cfg: AdvantageConfig, preset: Preset) -> list[Group]:
    """The same groups, with `advantage` set in their rollouts; with `advantage.turns: turn`, also `turn_advantages`.

    All groups must have the same size. `preset` is the preset of the loss, for the settings that `cfg` leaves open.
    Penalties count as one more reward of weight -1, for completions that have a score.
    """
    if cfg.turns == "turn":
        return _with_turn_advantages(groups, weights, cfg, preset)
    scores_NF, weights_F = _penalised(*_scores(groups, weights), groups)
    values: Any = advantages(scores_NF, weights_F, len(groups[0].rollouts), cfg, preset).tolist()
    return _changed(groups, (replace(r, advantage=value) for r, value in _zipped(groups, values)))


def has_variance(group: Group, turns_by: Weights | None = None) -> bool:
    """Whether the group's rewards differ: without variance, all its advantages are 0.

    Pass the weights as `turns_by` if each turn has its own advantage: then the rewards of the turns must differ.
    """
    if turns_by is None:
        return len({rollout.reward for rollout in group.rollouts if rollout.reward is not None}) > 1
    rewards_NT = turn_rewards([group], turns_by)
    return len({reward for row in rewards_NT for reward in row if not math.isnan(reward)}) > 1


def turn_rewards(groups: Sequence[Group], weights: Weights) -> list[list[float]]:
    """The weighted rewards of each completion's turns; NaN for a turn without a reward.

    The reward of a turn is what the environment's step returned for it. The last turn also gets the outcome, if there
    is one: the weighted sum of all other rewards, including what `get_reward` returned, minus the penalty. If the
    completion has a score, but neither an outcome nor a turn with a reward, the reward of its last turn is 0 (see
    `grpo.scoring.own`). A completion that failed or has no score has only NaN.
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
        replace(rollout, advantage=by_turn[0] if by_turn else 0.0, turn_advantages=by_turn)
        for rollout, by_turn in zip(rollouts, turns, strict=True)
    )
    return _changed(groups, changed)


def _of_turns(rollout: Rollout, weights: Weights, outcome: float, scored: bool) -> list[float]:
    """The rewards of a completion's turns. `outcome` does not include the penalty; NaN: there is no outcome.

    Raises ValueError if the conversation has rewards for another number of turns than its tokens.
    """
    conversation, count = rollout.trajectory.conversation, rollout.trajectory.turns
    given = () if conversation is None else conversation.turn_rewards
    if given and len(given) != count:
        raise ValueError(f"a conversation has rewards for {len(given)} turns, but its tokens are from {count} turns")
    if not scored or count == 0:
        return [math.nan] * count
    weight = 0.0 if conversation is None else weights.get(conversation.environment, 0.0)
    rewards = [weight * reward if reward is not None and weight else math.nan for reward in given or [None] * count]
    penalties = [-rollout.penalty] if rollout.penalty else []
    known = [reward for reward in (outcome, *penalties, rewards[-1]) if not math.isnan(reward)]
    # Without any reward in any turn, the completion's score is an empty sum: 0.
    nothing = not known and not all(map(math.isnan, rewards))
    return [*rewards[:-1], math.nan if nothing else sum(known)]


def _outcomes(scores_NF: mx.array, rollouts: Sequence[Rollout]) -> mx.array:
    """The scores without the rewards of turns: an environment's own score becomes what `get_reward` returned."""
    rows: Any = scores_NF.tolist()
    names = list(rollouts[0].scores)
    for row, rollout in zip(rows, rollouts, strict=True):
        conversation = rollout.trajectory.conversation
        if conversation is not None and conversation.environment in names:
            outcome = conversation.outcome
            row[names.index(conversation.environment)] = math.nan if outcome is None else outcome
    return mx.array(rows)


def _penalised(scores_NF: mx.array, weights_F: mx.array, groups: Sequence[Group]) -> tuple[mx.array, mx.array]:
    """Scores and weights, with any penalties as one more reward of weight -1, for completions that have a score whose
    weight is not 0."""
    penalties = [r.penalty for group in groups for r in group.rollouts]
    if any(penalties):
        scored = ~mx.isnan(total_rewards(scores_NF, weights_F))
        scores_NF = mx.concatenate([scores_NF, mx.where(scored, mx.array(penalties), mx.nan)[:, None]], axis=1)
        weights_F = mx.concatenate([weights_F, mx.array([-1.0])])
    return scores_NF, weights_F


def _scores(groups: Sequence[Group], weights: Weights) -> tuple[mx.array, mx.array]:
    """Scores `[N, F]`, NaN for no score, and weights `[F]`. If a function or the environment failed, the completion has
    no scores: a sum without the failed score could not be compared with the sums of other completions."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    names = list(rollouts[0].scores) if rollouts else list(weights)
    scores = [[math.nan if r.scores[name] is None or r.failed else r.scores[name] for name in names] for r in rollouts]
    return mx.array(scores), mx.array([float(weights[name]) for name in names])


def _zipped(groups: Sequence[Group], values: Sequence[float]) -> Iterator[tuple[Rollout, float]]:
    return zip((rollout for group in groups for rollout in group.rollouts), values, strict=True)


def _changed(groups: Sequence[Group], rollouts: Iterator[Rollout]) -> list[Group]:
    return [replace(group, rollouts=tuple(next(rollouts) for _ in group.rollouts)) for group in groups]
