"""The update: gradients summed over micro-batches and ranks, clipped, and applied by the optimizer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from grpo.backend.hub import one_line
from grpo.backend.random import derive_key
from grpo.backend.ranks import Ranks
from grpo.config import LossConfig, OptimConfig
from grpo.errors import RunError
from grpo.model.policy import Policy
from grpo.objective import combine_metrics
from grpo.objective.loss import CustomLoss
from grpo.progress import Progress
from grpo.training.batches import MiniBatch
from grpo.training.gradients import Gradient, Gradients
from grpo.training.optimizer import Float32Optimizer, grouped
from grpo.training.schedule import learning_rate
from grpo.training.teaching import Teacher
from grpo.types import Batch

log = logging.getLogger(__name__)

SUMMED = 2**18
"""Maximum size of small gradients that are joined and summed in one operation."""
ROW = 512
"""Squares are first summed in rows of this length: on a CPU MLX adds numbers one by one, and a plain sum of 200,000
squares had an error of 2e-4."""


@dataclass(frozen=True, slots=True)
class Update:
    """Measurements of a step's updates: loss, gradient norm before clipping, and the objective's metrics.

    They are means over the updates that were not skipped. If all were skipped, loss and norm are NaN and there are no
    metrics. `skipped` counts updates that were not finite, and `without_signal` updates whose gradient was exactly 0.
    Neither kind is applied.
    """

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    skipped: int = 0
    without_signal: int = 0


class Updater:
    """Holds the optimizer. One call makes one step's updates of the policy.

    If the folder `inspect` is set, the batches of a skipped update are written to it. Before an update is applied,
    `check` receives the step and the metrics, and then `moving` is called. If either raises, the update is not applied.
    """

    def __init__(
        self,
        policy: Policy,
        cfg: OptimConfig,
        loss: LossConfig,
        custom: CustomLoss | None = None,
        ranks: Ranks | None = None,
        dropout_seed: int | None = None,
        check: Callable[[int, Mapping[str, float]], None] = lambda *_: None,
        moving: Callable[[], None] = lambda: None,
        optimizer: Float32Optimizer | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """`dropout_seed` is the seed of the adapter's dropout, None without dropout.

        `optimizer` is an existing optimizer, whose state is continued.
        """
        self.policy = policy
        self.cfg = cfg
        self.dropout_seed = dropout_seed
        self.ranks = ranks or Ranks()
        self.check, self.moving = check, moving
        self.gradients = Gradients(policy, loss, custom, self.ranks, cfg.compile, teacher=teacher)
        self.optimizer = optimizer or _optimizer_of(policy, cfg)
        self.inspect: Path | None = None
        self.skipped_in_a_row = 0
        self.steps_without_signal = 0

    def __call__(self, minibatches: Sequence[MiniBatch], step: int) -> Update:
        """Make `optim.num_iterations` passes over the minibatches, with one update for each. Returns the means.

        With several processes, each passes its share of every minibatch. A batch without an anchor gets the logprobs of
        its first pass as its anchor: the policy has not changed before that pass, so the ratio is exactly 1.

        An update whose loss or gradient is not finite is skipped. Raises RunError after `optim.max_skipped_updates`
        skipped updates in a row. Updates that were applied before an error remain; `Trainer.wholly` undoes them.

        An update whose gradient is exactly 0 is not applied, because there is nothing to learn from it. The optimizer
        is not called, so neither momentum nor weight decay changes a weight, and its moments and step counter stay. The
        learning rate still follows the run's steps. A step with only such updates counts in `steps_without_signal`.
        """
        waiting, updates = list(minibatches), []
        with self.policy.spreading():
            for iteration in range(self.cfg.num_iterations):
                for number, batches in enumerate(waiting):
                    gradient = self.gradient(batches, self._dropout_key(step, iteration, number))
                    # Keep the anchors even if this update is skipped: a later minibatch may change the policy.
                    waiting[number] = gradient.batches
                    updates.append(self.apply(gradient, step))
                    del gradient  # else a gradient that was not applied would stay in memory next to the following one
        together = _together(updates)
        self.steps_without_signal += together.without_signal == len(updates)
        return together

    def _dropout_key(self, *position: int) -> mx.array | None:
        """The dropout key for a step, iteration, minibatch and rank; None without dropout."""
        if self.dropout_seed is None:
            return None
        return derive_key(self.dropout_seed, "dropout", *position, *self.ranks.own)

    def apply(self, gradient: Gradient, step: int) -> Update:
        """Make one optimizer step, unless the gradient is not finite or exactly 0."""
        norm = self._norm(gradient.arrays)
        update = Update(gradient.loss, cast(float, norm.item()), gradient.metrics)
        if not (math.isfinite(update.loss) and math.isfinite(update.grad_norm)):
            self._skip(gradient, update, step)
            return replace(update, skipped=1)
        self.check(step, update.metrics)
        if update.grad_norm == 0 and self._all_zero(gradient.arrays):  # the norm of tiny numbers underflows
            return replace(update, without_signal=1)  # `skipped_in_a_row` stays: this update does not end the series
        self.skipped_in_a_row = 0
        scale = mx.minimum(self.cfg.max_grad_norm / (norm + 1e-6), 1.0)
        self.moving()
        self.optimizer.learning_rate = learning_rate(self.cfg, step)
        self.optimizer.update(self.policy.model, gradient.arrays, scale)
        return update

    def _norm(self, gradients: dict[str, mx.array]) -> mx.array:
        """The Euclidean norm of all gradients together, computed a few arrays at a time."""
        shards = self.policy.shards
        parts = {path: array for path, array in gradients.items() if shards.divides(path)}
        whole = _squares({path: array for path, array in gradients.items() if path not in parts})
        return mx.sqrt(whole + shards.ranks.sum([_squares(parts)])[0])

    def _all_zero(self, gradients: dict[str, mx.array]) -> bool:
        """Whether all numbers of a gradient are 0, in all shards."""
        return not any(self.policy.shards.ranks.gather(any(a.any().item() for a in gradients.values())))

    def _skip(self, gradient: Gradient, update: Update, step: int) -> None:
        self.skipped_in_a_row += 1
        where = self._keep(self.inspect / f"step-{step:06d}", gradient, update) if self.inspect is not None else ""
        if self.skipped_in_a_row >= self.cfg.max_skipped_updates:
            raise RunError(
                f"step {step}: the update is not finite: loss {update.loss}, gradient norm {update.grad_norm}. Skipped "
                f"updates in a row: {self.skipped_in_a_row}; none of them was applied.{where} "
                "A lower optim.learning_rate or optim.max_grad_norm, or model.dtype: float32, may help."
            )

    def _keep(self, folder: Path, gradient: Gradient, update: Update) -> str:
        """Write the batches and the adapter of a skipped update to `folder`. Returns a sentence that names the folder;
        empty if writing failed, which only causes a warning."""
        arrays = {f"{i}.{name}": a for i, batch in enumerate(gradient.batches) for name, a in batch.arrays().items()}
        notes = {"loss": str(update.loss), "grad_norm": str(update.grad_norm), "not_finite": _not_finite(gradient)}
        state = self.policy.shards.whole(self.policy.adapters.state())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mx.save_safetensors(str(folder / f"batches-{self.ranks.everyone.rank}.safetensors"), arrays, notes)
            if self.ranks.first:
                self.policy.adapters.save(folder, state)
        except (OSError, RuntimeError) as error:  # MLX raises RuntimeError for a full disk
            log.warning("the batches of the skipped update could not be written to %s: %s", folder, one_line(error))
            return ""
        return f" The batches and the adapter of the last one are in {folder}."

    def gradient(self, batches: Sequence[Batch], dropout_key: mx.array | None = None) -> Gradient:
        """The gradient of the batches' summed loss. See `Gradients`."""
        return self.gradients(batches, dropout_key)

    @property
    def progress(self) -> Progress | None:
        """The callback that receives how many micro-batches of an update are done."""
        return self.gradients.progress

    @progress.setter
    def progress(self, progress: Progress | None) -> None:
        self.gradients.progress = progress


def _optimizer_of(policy: Policy, cfg: OptimConfig) -> Float32Optimizer:
    """The optimizer of the trainable parameters, or of this process's parts of them if weights are spread."""
    trained: dict[str, mx.array] = tree_flatten(policy.model.trainable_parameters(), destination={})
    if policy.spread is None:
        return Float32Optimizer(cfg, policy.model.trainable_parameters())
    optimizer = Float32Optimizer(cfg, tree_unflatten(list(policy.shards.part(trained).items())))
    mx.eval(optimizer.state)  # else float32 copies would keep references to the arrays that they are made from
    return optimizer


def _squares(gradients: dict[str, mx.array]) -> mx.array:
    """The sum of all squares, float32, computed a few arrays at a time."""
    total = mx.array(0.0)
    for paths in grouped(gradients, SUMMED):
        flat = [gradients[path].reshape(-1) for path in paths]
        if missing := -sum(array.size for array in flat) % ROW:
            flat.append(mx.zeros(missing))
        together = mx.concatenate(flat) if len(flat) > 1 else flat[0]  # one sum for all, not one per array
        total = total + together.square().reshape(-1, ROW).sum(axis=1).sum()
        mx.eval(total)
    return total


def bytes_of_a_norm(parameters: Any) -> int:
    """Bytes that the norm of these parameters' gradient needs besides the gradient: copies of arrays, and squares."""
    sizes: dict[str, mx.array] = tree_flatten(parameters, destination={})
    groups = [[sizes[path] for path in paths] for paths in grouped(sizes, SUMMED)]
    return max((4 * sum(a.size for a in arrays) * (1 if _is_whole_rows(arrays) else 2) for arrays in groups), default=0)


def _is_whole_rows(arrays: Sequence[mx.array]) -> bool:
    """Whether the arrays are summed without a copy."""
    return len(arrays) == 1 and arrays[0].size % ROW == 0


def _together(updates: Sequence[Update]) -> Update:
    """A step's updates combined into one."""
    finite = [update for update in updates if not update.skipped]
    return Update(
        loss=fmean(update.loss for update in finite) if finite else math.nan,
        grad_norm=fmean(update.grad_norm for update in finite) if finite else math.nan,
        metrics=combine_metrics([update.metrics for update in finite if update.metrics]),
        skipped=len(updates) - len(finite),
        without_signal=sum(update.without_signal for update in updates),
    )


def _not_finite(gradient: Gradient) -> str:
    """The parameters whose gradient is not finite."""
    return ", ".join(path for path, array in gradient.arrays.items() if not mx.isfinite(array).all().item())
