"""Measurements of a step's completions that need forward passes in addition to the update: entropy and KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from grpo.backend.ranks import Ranks
from grpo.config import LossConfig
from grpo.model.adapters import REFERENCE
from grpo.model.policy import Policy
from grpo.objective.kl import kl_estimate
from grpo.training.batches import by_row, forced, forced_with_entropies, learns, of_completions, rows_of
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

        Leaving them out of the metric would bias it: most belong to prompts on which the policy is certain. Entropy is
        the expectation of -log p, so the mean of -`behaviour` estimates it without bias and at no cost. This does not
        hold for completions of an older policy, whose `behaviour` describes that policy: they get a forward pass. If
        filters changed the sampling distribution, all completions get a forward pass.
        """
        rows = [row for row in rows_of(groups) if not learns(row[1], self.loss)]
        tokens = sum(rollout.trajectory.trained_tokens for _, rollout in rows)
        fresh = [rollout.trajectory for _, rollout in rows if not rollout.lag]
        surprise = -sum(sum(trajectory.of_trained(trajectory.behaviour or ())) for trajectory in fresh)
        if math.isfinite(surprise) and not any(trajectory.sampler for trajectory in fresh):
            older = [row for row in rows if row[1].lag]
            return Entropy(surprise + sum(by_row(older, self.packing, self._entropies, self.ranks)), tokens)
        return Entropy(sum(by_row(rows, self.packing, self._entropies, self.ranks)), tokens)

    def divergences(self, groups: Sequence[Group]) -> list[float]:
        """The KL estimate of each completion, summed over its trained tokens, between `behaviour` and the reference.

        One forward pass under the reference.
        """
        with self.policy.use(REFERENCE):
            of_rows = by_row(rows_of(groups), self.packing, self._divergences, self.ranks)
        return [sum(totals) for totals in of_completions(groups, of_rows)]

    def _entropies(self, batch: Batch) -> mx.array:
        """The sum of each row's entropies over its trained tokens: `[B]`."""
        return mx.where(batch.trained > 0, forced_with_entropies(self.policy, batch)[1], 0.0).sum(axis=1)

    def _divergences(self, batch: Batch) -> mx.array:
        """The sum of each row's KL estimates over its trained tokens: `[B]`."""
        assert batch.behaviour is not None, "training needs rollouts with logprobs"
        estimate = kl_estimate(batch.behaviour, forced(self.policy, batch), self.loss.kl_estimator)
        return mx.where(batch.trained > 0, estimate, 0.0).sum(axis=1)


def with_all_entropy(update: Update, rest: Entropy, totals: Totals) -> Update:
    """The update with the metric `entropy` over all tokens of the step: the tokens of the update, and the `rest`.

    Unchanged if every update was skipped, because then the entropy of the update's tokens is unknown.
    """
    seen = totals.tokens - rest.tokens
    if not totals.tokens or (seen and "entropy" not in update.metrics):
        return update
    total = update.metrics.get("entropy", 0.0) * seen + rest.total
    return replace(update, metrics={**update.metrics, "entropy": total / totals.tokens})


def mean_kl(divergences: Sequence[float], totals: Totals) -> float:
    """The mean KL over trained tokens, from the sums that `divergences` returns."""
    return sum(divergences) / max(totals.tokens, 1)
