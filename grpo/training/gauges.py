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
from grpo.types import Batch, Group


@dataclass(frozen=True, slots=True)
class Entropy:
    """A sum of tokens' entropies in nats, and how many tokens it is of."""

    total: float
    tokens: int


def entropy_left_out(groups: Sequence[Group], policy: Policy, cfg: Recipe, ranks: Ranks) -> Entropy:
    """The entropy of the completions that the update will not see: those that can have no gradient.

    They are no fair sample of the step: most are of prompts that the policy is sure of. Entropy is the expectation of
    -log p, so the sampler's own logprobs tell it, without bias and at no cost. Where tokens were drawn from another
    distribution than the policy's they do not: then one forward pass of each completion, divided among the processes.
    """
    rows = [row for row in rows_of(groups) if not learns(row[1], cfg)]
    surprise = -sum(sum(rollout.completion.logprobs or ()) for _, rollout in rows)
    if math.isfinite(surprise) and not any(rollout.completion.sampler_logprobs for _, rollout in rows):
        return Entropy(surprise, sum(len(rollout.completion.token_ids) for _, rollout in rows))
    mine = ranks.share(list(row_batches(rows, cfg)))
    total = sum(float((forced(policy, batch)[1] * batch.mask).sum()) for batch in mine)
    return Entropy(sum(ranks.gather(total)), sum(len(rollout.completion.token_ids) for _, rollout in rows))


def with_all_entropy(update: Update, rest: Entropy, groups: Sequence[Group], cfg: Recipe) -> Update:
    """The same update with the entropy of all the step's tokens: of those that it saw, and of the rest.

    Without any if every update was skipped: what they saw is not known then.
    """
    seen = sum(len(rollout.completion.token_ids) for _, rollout in rows_of(groups) if learns(rollout, cfg))
    if seen and "entropy" not in update.metrics:
        return update
    total = update.metrics.get("entropy", 0.0) * seen + rest.total
    return replace(update, metrics={**update.metrics, "entropy": total / (seen + rest.tokens)})


def divergences(groups: Sequence[Group], policy: Policy, cfg: Recipe, ranks: Ranks) -> list[float]:
    """The KL estimate of each completion, summed over its tokens, between its sampler's logprobs and the reference's.

    One forward pass under the reference, divided among the processes.
    """
    mine = ranks.share(list(row_batches(rows_of(groups), cfg)))
    with policy.use("reference"):
        found = [_sums(batch, forced(policy, batch)[0], cfg) for batch in mine]
    return [total for sums in ranks.merge(found) for total in sums]


def mean_kl(divergences: Sequence[float], groups: Sequence[Group]) -> float:
    """The mean over tokens of what `divergences` sums up for each completion."""
    return sum(divergences) / sum(len(rollout.completion.token_ids) for _, rollout in rows_of(groups))


def kl_metric(groups: Sequence[Group], policy: Policy, cfg: Recipe, step: int, ranks: Ranks) -> dict[str, float]:
    """`kl` at the steps at which `log.kl` asks for it, in a run that has no penalty to tell it."""
    if cfg.kl_every is None or step % cfg.kl_every:
        return {}
    return {"kl": mean_kl(divergences(groups, policy, cfg, ranks), groups)}


def _sums(batch: Batch, reference: mx.array, cfg: Recipe) -> list[float]:
    estimate = kl_estimate(batch.sampling_logprobs, reference, cfg.loss.kl_estimator)
    sums: Any = mx.where(batch.mask > 0, estimate, 0.0).sum(axis=1).tolist()
    return list(sums[: batch.real_rows])
