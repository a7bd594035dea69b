"""The update: gradients summed over micro-batches, clipped, and AdamW steps on the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from grpo.backend.device import compiled
from grpo.config import LossConfig, Recipe
from grpo.errors import RunError
from grpo.model.policy import Policy
from grpo.objective import combine_metrics, policy_loss
from grpo.objective.loss import CustomLoss
from grpo.training.batches import MiniBatch
from grpo.training.schedule import learning_rate
from grpo.types import Batch


@dataclass(frozen=True, slots=True)
class Update:
    """What an update measured: the loss, the gradient's norm before clipping, and the objective's metrics."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient of a minibatch's loss as a tree, the loss, its metrics, and the batches with old logprobs."""

    tree: Any
    loss: float
    metrics: dict[str, float]
    batches: list[Batch]


class Updater:
    """Holds the optimiser. One call is one step's updates of the policy."""

    def __init__(self, policy: Policy, cfg: Recipe, custom: CustomLoss | None = None) -> None:
        self.policy = policy
        self.cfg = cfg
        self.custom = custom
        self.optimizer = optim.AdamW(
            learning_rate=cfg.optim.learning_rate, weight_decay=cfg.optim.weight_decay, bias_correction=True
        )
        self.optimizer.init(policy.model.trainable_parameters())
        self._loss_and_grad = compiled(nn.value_and_grad(policy.model, self._loss), policy.model.state)

    def __call__(self, minibatches: Sequence[MiniBatch], step: int) -> Update:
        """`optim.num_iterations` passes of one update for each minibatch; what is returned is over all of them.

        A batch without old logprobs gets those of its first pass: there the policy is still what it was, and the ratio
        exactly 1. Raises RunError, with the policy as it was before the step, when a loss or a gradient is not finite.
        """
        before = self.policy.adapters.state()
        try:
            return self._updated(minibatches, step)
        except RunError:
            self.policy.adapters.load_state(before)
            raise

    def _updated(self, minibatches: Sequence[MiniBatch], step: int) -> Update:
        self.optimizer.learning_rate = learning_rate(self.cfg.optim, step)
        waiting, updates = list(minibatches), []
        for _ in range(self.cfg.optim.num_iterations):
            for number, batches in enumerate(waiting):
                gradient = self.gradient(batches)
                updates.append(self._apply(gradient, step))
                waiting[number] = gradient.batches
        return Update(
            loss=sum(update.loss for update in updates) / len(updates),
            grad_norm=sum(update.grad_norm for update in updates) / len(updates),
            metrics=combine_metrics([update.metrics for update in updates if update.metrics]),
        )

    def _apply(self, gradient: Gradient, step: int) -> Update:
        clipped, norm = optim.clip_grad_norm(gradient.tree, self.cfg.optim.max_grad_norm)
        update = Update(gradient.loss, norm.item(), gradient.metrics)
        if not (mx.isfinite(norm).item() and mx.isfinite(mx.array(gradient.loss)).item()):
            raise RunError(
                f"step {step}: loss {update.loss}, gradient norm {update.grad_norm}: not finite, not applied"
            )
        self.optimizer.update(self.policy.model, clipped)
        mx.eval(self.policy.model.trainable_parameters(), self.optimizer.state)
        return update

    def gradient(self, batches: Sequence[Batch]) -> Gradient:
        """The gradient of the batches' summed loss; of no batches (nothing to learn from), zeros."""
        tree = tree_map(mx.zeros_like, self.policy.model.trainable_parameters())
        loss, parts, seen = 0.0, [], []
        for batch in batches:
            (value, (metrics, logprobs)), gradient = self._loss_and_grad(batch.arrays())
            tree = tree_map(mx.add, tree, gradient)
            mx.eval(tree, value, metrics, logprobs)  # one micro-batch's activations at a time
            loss += value.item()
            parts.append({name: float(metric.item()) for name, metric in metrics.items()})
            seen.append(batch if batch.old_logprobs is not None else replace(batch, old_logprobs=logprobs))
        return Gradient(tree, loss, combine_metrics(parts), seen)

    def _loss(self, arrays: dict[str, mx.array]) -> tuple[mx.array, tuple[dict[str, mx.array], mx.array]]:
        loss_cfg = self.cfg.loss
        logprobs, entropies = self.policy.logprobs(
            arrays["tokens"], arrays["prompt_lengths"], arrays["completion_ids"], loss_cfg.entropy_coef > 0
        )
        custom = _guarded(self.custom) if self.custom else None
        loss, metrics = policy_loss(logprobs, SimpleNamespace(**arrays), loss_cfg, entropies, custom)
        return loss, (metrics, mx.stop_gradient(logprobs))


def _guarded(custom: CustomLoss) -> CustomLoss:
    """A researcher's loss, whose mistakes are said as such."""

    def call(logprobs: mx.array, batch: Any, cfg: LossConfig) -> mx.array:
        try:
            per_token = custom(logprobs, batch, cfg)
        except Exception as error:
            raise RunError(f"loss.use: {cfg.use} failed: {type(error).__name__}: {error}") from error
        if not isinstance(per_token, mx.array) or per_token.shape != logprobs.shape:
            shape = getattr(per_token, "shape", type(per_token).__name__)
            raise RunError(
                f"loss.use: {cfg.use} returned {shape}, not an array of the logprobs' shape {logprobs.shape}"
            )
        return per_token

    return call
