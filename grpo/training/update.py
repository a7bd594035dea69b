"""The update: gradients summed over micro-batches, clipped, and one AdamW step (or several) on the adapter."""

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
from grpo.config import Recipe
from grpo.errors import RunError
from grpo.model.policy import Policy
from grpo.objective import policy_loss
from grpo.training.schedule import learning_rate
from grpo.types import Batch


@dataclass(frozen=True, slots=True)
class Update:
    """What an update measured: the loss, the gradient's norm before clipping, and sums over tokens by name."""

    loss: float
    grad_norm: float
    learning_rate: float
    sums: dict[str, float]


class Updater:
    """Holds the optimiser. One call is one update of the policy from a step's batches."""

    def __init__(self, policy: Policy, cfg: Recipe) -> None:
        self.policy = policy
        self.cfg = cfg
        self.optimizer = optim.AdamW(
            learning_rate=cfg.optim.learning_rate, weight_decay=cfg.optim.weight_decay, bias_correction=True
        )
        self.optimizer.init(policy.model.trainable_parameters())
        self._loss_and_grad = compiled(nn.value_and_grad(policy.model, self._loss), policy.model.state)

    def __call__(self, batches: Sequence[Batch], step: int) -> Update:
        """Apply `optim.num_iterations` updates; what is returned is averaged over them.

        Logprobs before the first are its own, so keeping them costs nothing. Raises RunError, with the policy as
        it was, when the loss or the gradient is not finite.
        """
        rate = learning_rate(self.cfg.optim, step)
        self.optimizer.learning_rate = rate
        updates = []
        for _ in range(self.cfg.optim.num_iterations):
            update, batches = self._once(batches, rate, step)
            updates.append(update)
        return _average(updates)

    def _once(self, batches: Sequence[Batch], rate: float, step: int) -> tuple[Update, list[Batch]]:
        gradients, loss, sums, seen = self.gradients(batches)
        clipped, norm = optim.clip_grad_norm(gradients, self.cfg.optim.max_grad_norm)
        update = Update(loss, norm.item(), rate, sums)
        if not (mx.isfinite(norm).item() and mx.isfinite(mx.array(loss)).item()):
            raise RunError(f"step {step}: loss {loss}, gradient norm {update.grad_norm}: not finite, so not applied")
        self.optimizer.update(self.policy.model, clipped)
        mx.eval(self.policy.model.trainable_parameters(), self.optimizer.state)
        return update, seen

    def gradients(self, batches: Sequence[Batch]) -> tuple[Any, float, dict[str, float], list[Batch]]:
        """The gradient tree of the summed loss, the loss, sums of its metrics, and the batches with old logprobs.

        No batches (a step without anything to learn from) give a gradient of zeros.
        """
        total = tree_map(mx.zeros_like, self.policy.model.trainable_parameters())
        loss, sums, seen = 0.0, dict[str, float](), []
        for batch in batches:
            (value, (metrics, logprobs)), gradient = self._loss_and_grad(batch.arrays())
            total = tree_map(mx.add, total, gradient)
            mx.eval(total, value, metrics, logprobs)  # one micro-batch's activations at a time
            loss += value.item()
            sums = {name: sums.get(name, 0.0) + metric.item() for name, metric in metrics.items()}
            seen.append(batch if batch.old_logprobs is not None else replace(batch, old_logprobs=logprobs))
        return total, loss, sums, seen

    def _loss(self, arrays: dict[str, mx.array]) -> tuple[mx.array, tuple[dict[str, mx.array], mx.array]]:
        logprobs, entropies = self.policy.logprobs(arrays["tokens"], arrays["prompt_lengths"], arrays["completion_ids"])
        loss, metrics = policy_loss(logprobs, SimpleNamespace(**arrays), self.cfg.loss, entropies)
        return loss, (metrics, mx.stop_gradient(logprobs))


def _average(updates: Sequence[Update]) -> Update:
    count = len(updates)
    names = updates[0].sums
    return Update(
        loss=sum(update.loss for update in updates) / count,
        grad_norm=sum(update.grad_norm for update in updates) / count,
        learning_rate=updates[0].learning_rate,
        sums={name: sum(update.sums[name] for update in updates) / count for name in names},
    )
