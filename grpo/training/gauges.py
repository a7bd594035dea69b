"""What is told of a step's completions and its update does not compute: forward passes beside the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from grpo.backend.ranks import Ranks
from grpo.config import Recipe
from grpo.model.policy import Policy
from grpo.objective.kl import kl_estimate
from grpo.training.batches import forced, learns, row_batches, rows_of
from grpo.training.update import Update
from grpo.types import Batch, Group, Totals


@dataclass(frozen=True, slots=True)
class Entropy:
    """A sum of trained tokens' entropies in nats, and how many tokens it is of."""

    total: float
    tokens: int


def entropy_left_out(groups: Sequence[Group], policy: Policy, cfg: Recipe, ranks: Ranks) -> Entropy:
    """The entropy of the completions that the update will not see: those that can have no gradient.

    They are no fair sample of the step: most are of prompts that the policy is sure of. Entropy is the expectation of
    -log p, so the sampler's own logprobs tell it, without bias and at no cost. Where tokens were drawn from another
    distribution than the policy's they do not: then one forward pass of each completion, divided among the processes.
    """
    rows = [row for row in rows_of(groups) if not learns(row[1], cfg)]
    left = [rollout.trajectory for _, rollout in rows]
    tokens = sum(trajectory.trained_tokens for trajectory in left)
    surprise = -sum(sum(trajectory.of_trained(trajectory.behaviour or ())) for trajectory in left)
    if math.isfinite(surprise) and not any(trajectory.sampler for trajectory in left):
        return Entropy(surprise, tokens)
    mine = ranks.share([batch for _, batch in row_batches(rows, cfg)])
    total = sum(float(mx.where(batch.trained > 0, forced(policy, batch)[1], 0.0).sum()) for batch in mine)
    return Entropy(sum(ranks.gather(total)), tokens)


def with_all_entropy(update: Update, rest: Entropy, totals: Totals) -> Update:
    """The same update with the entropy of all the step's tokens: of those that it saw, and of the rest.

    Without any if every update was skipped: what they saw is not known then.
    """
    seen = totals.tokens - rest.tokens
    if not totals.tokens or (seen and "entropy" not in update.metrics):
        return update
    total = update.metrics.get("entropy", 0.0) * seen + rest.total
    return replace(update, metrics={**update.metrics, "entropy": total / totals.tokens})


def divergences(groups: Sequence[Group], policy: Policy, cfg: Recipe, ranks: Ranks) -> list[float]:
    """The KL estimate of each completion, summed over its trained tokens, between `behaviour` and the reference's
    logprobs.

    One forward pass under the reference, divided among the processes.
    """
    mine = ranks.share(list(row_batches(rows_of(groups), cfg)))
    with policy.use("reference"):
        found = [_sums(len(rows), batch, forced(policy, batch)[0], cfg) for rows, batch in mine]
    return [total for sums in ranks.merge(found) for total in sums]


def mean_kl(divergences: Sequence[float], totals: Totals) -> float:
    """The mean over trained tokens of what `divergences` sums up for each completion."""
    return sum(divergences) / max(totals.tokens, 1)


def kl_metric(
    groups: Sequence[Group], totals: Totals, policy: Policy, cfg: Recipe, step: int, ranks: Ranks
) -> dict[str, float]:
    """`kl` at the steps at which `log.kl` asks for it, in a run that has no penalty to tell it."""
    if cfg.kl_every is None or step % cfg.kl_every:
        return {}
    return {"kl": mean_kl(divergences(groups, policy, cfg, ranks), totals)}


def _sums(rows: int, batch: Batch, reference: mx.array, cfg: Recipe) -> list[float]:
    assert batch.behaviour is not None, "training needs rollouts with logprobs"
    estimate = kl_estimate(batch.behaviour, reference, cfg.loss.kl_estimator)
    sums: Any = mx.where(batch.trained > 0, estimate, 0.0).sum(axis=1).tolist()
    return list(sums[:rows])
