"""What is told of a step's completions and its update does not compute: forward passes beside the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from grpo.backend.ranks import Ranks
from grpo.config import LossConfig
from grpo.model.adapters import REFERENCE
from grpo.model.policy import Policy
from grpo.objective.kl import kl_estimate
from grpo.training.batches import forced, learns, row_batches, rows_of
from grpo.training.packing import Packing
from grpo.training.update import Update
from grpo.types import Batch, Group, Totals


@dataclass(frozen=True, slots=True)
class Entropy:
    """A sum of trained tokens' entropies in nats, and how many tokens it is of."""

    total: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Gauges:
    """Measures completions under the policy; what it takes to is divided among the processes."""

    policy: Policy
    loss: LossConfig
    packing: Packing
    ranks: Ranks

    def entropy_left_out(self, groups: Sequence[Group]) -> Entropy:
        """The entropy of the completions that the update will not see: those that can have no gradient.

        They are no fair sample of the step: most are of prompts that the policy is sure of. Entropy is the expectation
        of -log p, so `behaviour` tells it, without bias and at no cost. Where tokens were drawn from another
        distribution than the policy's it does not: then one forward pass of each completion does.
        """
        rows = [row for row in rows_of(groups) if not learns(row[1], self.loss)]
        left = [rollout.trajectory for _, rollout in rows]
        tokens = sum(trajectory.trained_tokens for trajectory in left)
        surprise = -sum(sum(trajectory.of_trained(trajectory.behaviour or ())) for trajectory in left)
        if math.isfinite(surprise) and not any(trajectory.sampler for trajectory in left):
            return Entropy(surprise, tokens)
        mine = self.ranks.share([batch for _, batch in row_batches(rows, self.packing)])
        total = sum(float(mx.where(batch.trained > 0, forced(self.policy, batch)[1], 0.0).sum()) for batch in mine)
        return Entropy(sum(self.ranks.gather(total)), tokens)

    def divergences(self, groups: Sequence[Group]) -> list[float]:
        """The KL estimate of each completion, summed over its trained tokens, between `behaviour` and the reference.

        One forward pass under the reference.
        """
        mine = self.ranks.share(list(row_batches(rows_of(groups), self.packing)))
        with self.policy.use(REFERENCE):
            found = [self._sums(len(rows), batch, forced(self.policy, batch)[0]) for rows, batch in mine]
        return [total for sums in self.ranks.merge(found) for total in sums]

    def _sums(self, rows: int, batch: Batch, reference: mx.array) -> list[float]:
        assert batch.behaviour is not None, "training needs rollouts with logprobs"
        estimate = kl_estimate(batch.behaviour, reference, self.loss.kl_estimator)
        sums: Any = mx.where(batch.trained > 0, estimate, 0.0).sum(axis=1).tolist()
        return list(sums[:rows])


def with_all_entropy(update: Update, rest: Entropy, totals: Totals) -> Update:
    """The same update with the entropy of all the step's tokens: of those that it saw, and of the rest.

    Without any if every update was skipped: what they saw is not known then.
    """
    seen = totals.tokens - rest.tokens
    if not totals.tokens or (seen and "entropy" not in update.metrics):
        return update
    total = update.metrics.get("entropy", 0.0) * seen + rest.total
    return replace(update, metrics={**update.metrics, "entropy": total / totals.tokens})


def mean_kl(divergences: Sequence[float], totals: Totals) -> float:
    """The mean over trained tokens of what `divergences` sums up for each completion."""
    return sum(divergences) / max(totals.tokens, 1)
