"""Measurements of a step's completions that need forward passes beside the update: entropy and KL."""

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
from grpo.training.batches import forced, learns, of_completions, row_batches, rows_of
from grpo.training.packing import Packing
from grpo.training.update import Update
from grpo.types import Batch, Group, Totals


@dataclass(frozen=True, slots=True)
class Entropy:
    """The sum of the entropies of `tokens` trained tokens, in nats."""

    total: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Gauges:
    """Measures completions under the policy. The ranks divide the forward passes among themselves."""

    policy: Policy
    loss: LossConfig
    packing: Packing
    ranks: Ranks

    def entropy_left_out(self, groups: Sequence[Group]) -> Entropy:
        """The entropy of the completions that the update leaves out because they cannot have a gradient.

        Leaving them out of the metric would bias it: most belong to prompts that the policy is sure of. Entropy is the
        expectation of -log p, so the mean of -`behaviour` estimates it without bias and at no cost. If filters changed
        the distribution that was drawn from, this does not hold, and a forward pass of each completion is made.
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
        of_rows = [total for sums in self.ranks.merge(found) for total in sums]
        return [sum(totals) for totals in of_completions(groups, of_rows)]

    def _sums(self, rows: int, batch: Batch, reference: mx.array) -> list[float]:
        assert batch.behaviour is not None, "training needs rollouts with logprobs"
        estimate = kl_estimate(batch.behaviour, reference, self.loss.kl_estimator)
        sums: Any = mx.where(batch.trained > 0, estimate, 0.0).sum(axis=1).tolist()
        return list(sums[:rows])


def with_all_entropy(update: Update, rest: Entropy, totals: Totals) -> Update:
    """The update with the metric `entropy` over all tokens of the step: those that it saw, and the `rest`.

    Unchanged if every update was skipped, since the entropy that they saw is unknown then.
    """
    seen = totals.tokens - rest.tokens
    if not totals.tokens or (seen and "entropy" not in update.metrics):
        return update
    total = update.metrics.get("entropy", 0.0) * seen + rest.total
    return replace(update, metrics={**update.metrics, "entropy": total / totals.tokens})


def mean_kl(divergences: Sequence[float], totals: Totals) -> float:
    """The mean KL over trained tokens, from the sums that `divergences` returns."""
    return sum(divergences) / max(totals.tokens, 1)
