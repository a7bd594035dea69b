"""What the trainer does between sampling and the update, by a whole recipe: tests have one, rooms take its sections."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.backend.ranks import Ranks
from grpo.config import Recipe
from grpo.model.policy import Policy
from grpo.objective import groups as objective
from grpo.objective.loss import CustomLoss
from grpo.training import batches, passes, penalties, update
from grpo.training.batches import MiniBatch
from grpo.training.gauges import Gauges
from grpo.training.packing import Packing
from grpo.types import Group, Totals


def with_advantages(groups: Sequence[Group], cfg: Recipe) -> list[Group]:
    return objective.with_advantages(groups, weights(groups, cfg), cfg.advantage, cfg.loss.preset)


def weights(groups: Sequence[Group], cfg: Recipe) -> dict[str, float]:
    """By the names that the groups' scores have, in the order of the recipe's rewards."""
    return dict(zip(groups[0].rollouts[0].scores, (reward.weight for reward in cfg.rewards), strict=True))


def packing_of(cfg: Recipe, parts: int = 1) -> Packing:
    return Packing.of(cfg.optim, cfg.rollout, parts)


def make_batches(groups: Sequence[Group], cfg: Recipe, parts: int = 1, beta: float | None = None) -> MiniBatch:
    """`beta`: by default `loss.beta`, as at a first step."""
    beta = cfg.loss.beta if beta is None else beta
    return batches.make_batches(groups, cfg.loss, packing_of(cfg, parts), cfg.rollout.max_completion_length, beta)


def make_minibatches(groups: Sequence[Group], cfg: Recipe, parts: int = 1) -> list[MiniBatch]:
    longest, number = cfg.rollout.max_completion_length, cfg.optim.num_minibatches
    return batches.make_minibatches(groups, cfg.loss, packing_of(cfg, parts), longest, number, cfg.loss.beta)


def pass_settings(cfg: Recipe) -> passes.PassSettings:
    return passes.PassSettings(cfg.loss, cfg.adapter.dropout > 0)


def with_reference(of_one_update: MiniBatch, policy: Policy, cfg: Recipe) -> MiniBatch:
    (enriched,) = passes.with_reference(policy, [of_one_update], pass_settings(cfg))
    return enriched


def with_anchor(minibatches: Sequence[MiniBatch], policy: Policy, cfg: Recipe) -> list[MiniBatch]:
    return passes.with_anchor(policy, minibatches, pass_settings(cfg))


def with_top_entropy(minibatches: Sequence[MiniBatch], policy: Policy, cfg: Recipe) -> list[MiniBatch]:
    return passes.with_top_entropy(policy, minibatches, pass_settings(cfg))


def gauges(policy: Policy, cfg: Recipe, ranks: Ranks | None = None) -> Gauges:
    return Gauges(policy, cfg.loss, packing_of(cfg), ranks or Ranks())


def with_penalties(
    groups: Sequence[Group], policy: Policy, cfg: Recipe, beta: float
) -> tuple[list[Group], dict[str, float]]:
    cache, longest = cfg.advantage.soft_overlong_cache, cfg.rollout.max_completion_length
    return penalties.with_penalties(groups, Totals.of(groups), beta, cache, longest, gauges(policy, cfg))


def updater(
    policy: Policy, cfg: Recipe, custom: CustomLoss | None = None, ranks: Ranks | None = None
) -> update.Updater:
    seed = cfg.seed if cfg.adapter.dropout > 0 else None
    return update.Updater(policy, cfg.optim, cfg.loss, custom, ranks, seed)
