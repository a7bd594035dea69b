"""The gradient of a loss, summed over micro-batches and processes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from grpo.backend.device import compiled, same_objects
from grpo.backend.lanes import side_by_side
from grpo.backend.ranks import Ranks
from grpo.config import LossConfig
from grpo.model.dropout import dropping
from grpo.model.policy import Policy
from grpo.objective import combine_metrics, policy_loss
from grpo.objective.loss import CustomLoss
from grpo.objective.measures import Metrics
from grpo.progress import Progress
from grpo.training.batches import batch_hidden, batch_logprobs
from grpo.training.custom import guarded
from grpo.training.lanes import tokens_of, update_lanes
from grpo.training.optimizer import grouped
from grpo.training.teaching import Teacher
from grpo.types import Batch


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient of a minibatch's loss, the loss, its metrics, and its batches with anchors.

    `arrays` are float32, by the parameters' paths; applying the gradient empties them.
    """

    arrays: dict[str, mx.array]
    loss: float
    metrics: dict[str, float]
    batches: list[Batch]


class Gradients:
    """Computes gradients of a loss, or of a user's `custom` loss, with respect to a policy's trainable parameters."""

    def __init__(
        self,
        policy: Policy,
        loss: LossConfig,
        custom: CustomLoss | None = None,
        ranks: Ranks | None = None,
        compiles: bool = True,
        alone: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        """With `compiles`, the computation is compiled where that pays. `alone`: micro-batches are computed one after
        the other, even on a CPU that could compute several in parallel."""
        self.policy, self.loss, self.custom = policy, loss, custom
        self.ranks = ranks or Ranks()
        self.progress: Progress | None = None
        self.alone, self.teacher = alone, teacher
        self._loss_and_grad = nn.value_and_grad(policy.model, self._loss)
        self._accumulate = compiled(self._accumulated, policy.model.state) if compiles else self._accumulated
        self._traces = self._accumulate != self._accumulated

    def __call__(self, batches: Sequence[Batch], dropout_key: mx.array | None = None) -> Gradient:
        """The gradient of the batches' summed loss; zeros if there are no batches, because nothing is to be learned.

        With a dropout key (uint32 `[2]`) the adapter's dropout is on, with different masks for each batch.
        """
        total: list[Any] = [tree_map(lambda p: mx.zeros(p.shape), self.policy.model.trainable_parameters())]
        parts: list[dict[str, float]] = []
        loss, seen = 0.0, []
        idle = self._idle(batches)
        self._tell(0, len(batches))  # the first batch may take long, because a GPU builds its kernels
        untouched = same_objects(self.policy.model) if self._traces else nullcontext()
        with untouched, closing(self._added(total, batches, dropout_key)) as added:
            self._pass_idly(total, idle.get(0, ()))
            for batch, (value, metrics, logprobs) in zip(batches, added, strict=True):
                loss += cast(float, value.item())
                parts.append({name: cast(float, metric.item()) for name, metric in metrics.items()})
                seen.append(batch if batch.anchor is not None else replace(batch, anchor=logprobs))
                self._tell(len(seen), len(batches))
                self._pass_idly(total, idle.get(len(seen), ()))
        everyone = self.ranks.gather((loss, parts))
        every_part = [part for _, theirs in everyone for part in theirs]
        arrays: dict[str, mx.array] = tree_flatten(total.pop(), destination={})
        for summed, ranks in self.policy.shards.sums_of(list(arrays), self.ranks):
            for paths in grouped({path: arrays[path] for path in summed}):  # in groups: each sum is a new array
                arrays |= zip(paths, ranks.sum([arrays.pop(path) for path in paths]), strict=True)
        return Gradient(arrays, sum(one for one, _ in everyone), combine_metrics(every_part), seen)

    def _idle(self, batches: Sequence[Batch]) -> dict[int, list[Batch]]:
        """Batches to pass through the model without effect, by the number of real batches that come before them.

        With spread weights, all processes must gather the weights equally often and in the same order, so processes
        with fewer batches fill up with idle ones. Batches in lines come first (`pack`) and go through the model once;
        batches in rows go through it twice, first the prompts and then the completions.
        """
        if not self.policy.is_spread or self.ranks.size == 1:
            return {}
        kinds = [[batch for batch in batches if (batch.lines is not None) == lines] for lines in (True, False)]
        numbers = self.ranks.gather([len(here) for here in kinds])
        idle: dict[int, list[Batch]] = {}
        done = 0
        for here, counts in zip(kinds, zip(*numbers, strict=True), strict=True):
            done += len(here)
            given = here[-1:]
            if not all(counts) and any(counts):
                first = {name: np.array(array) for name, array in here[0].arrays().items()} if here else None
                arrays = next(found for found in self.ranks.gather(first) if found is not None)
                given = given or [Batch.of({name: mx.array(array) for name, array in arrays.items()})]
            idle.setdefault(done, []).extend(given * (max(counts) - len(here)))
        return idle

    def _pass_idly(self, total: list[Any], batches: Sequence[Batch]) -> None:
        """Pass idle batches through the model, to take part in exchanges between processes. Their gradient is 0."""
        for batch in batches:
            with self.policy.training():
                _, gradient = nn.value_and_grad(self.policy.model, self._nothing)(batch)
            total.append(tree_map(mx.add, total.pop(), gradient))
            del gradient
            mx.eval(total)

    def _nothing(self, batch: Batch) -> mx.array:
        nothing: mx.array = 0 * self._forward(batch)[0].sum()
        return nothing

    def _tell(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress("update", done, total)

    def _added(
        self, total: list[Any], batches: Sequence[Batch], dropout_key: mx.array | None
    ) -> Generator[tuple[mx.array, Metrics, mx.array], None, None]:
        """Add each batch's gradient to the only tree in `total`, in order, and yield its loss, metrics and logprobs."""
        # Keys are inputs, because otherwise the compiled function would draw the same masks forever.
        keys = [None] * len(batches) if dropout_key is None else mx.random.split(dropout_key, len(batches))
        inputs = [(batch.arrays(), key) for batch, key in zip(batches, keys, strict=True)]
        tokens = max((tokens_of(arrays) for arrays, _ in inputs), default=0)
        # A user's loss may read arrays that are not computed yet, and two lanes must not both compute them.
        alone = self.alone or self.custom is not None
        number = 1 if alone else update_lanes(self.policy.model, tokens, len(batches), self.ranks)
        if number == 1:
            for batch, (arrays, key) in zip(batches, inputs, strict=True):
                with self.policy.training():
                    tree, found = self._accumulate(total.pop(), arrays, key)
                total.append(tree)
                del tree
                mx.async_eval(total, *found)  # type: ignore[no-untyped-call]  # runs while Python builds the rest
                loss, metrics = self._measured(batch, *found)
                mx.eval(total, loss, metrics, found)  # one micro-batch's activations at a time
                yield loss, metrics, found[0]
            return
        made = side_by_side(self._of_one, inputs, number, self.policy.model.state)
        for gradient, loss, metrics, logprobs in made:
            total.append(tree_map(mx.add, total.pop(), gradient))  # in a fixed order, whichever lane is faster
            del gradient
            mx.eval(total)
            yield loss, metrics, logprobs

    def _of_one(self, given: tuple[dict[str, mx.array], mx.array | None]) -> tuple[Any, mx.array, Metrics, mx.array]:
        """The gradient, loss, metrics and logprobs of a batch, given as its arrays and its dropout key."""
        batch, dropout_key = Batch.of(given[0]), given[1]
        with self.policy.training():
            (_, found), gradient = self._loss_and_grad(batch, dropout_key)
        return gradient, *self._measured(batch, *found), found[0]

    def _accumulated(
        self, tree: Any, arrays: dict[str, mx.array], dropout_key: mx.array | None
    ) -> tuple[Any, tuple[mx.array, ...]]:
        """The float32 tree with the batch's gradient added, and the outputs of `_forward` for the batch."""
        (_, found), gradient = self._loss_and_grad(Batch.of(arrays), dropout_key)
        return tree_map(mx.add, tree, gradient), found

    def _loss(self, batch: Batch, dropout_key: mx.array | None) -> tuple[mx.array, tuple[mx.array, ...]]:
        with dropping(dropout_key):
            found = self._forward(batch)
        loss, _ = self._measured(batch, *found)
        return loss, tuple(map(mx.stop_gradient, found))

    def _forward(self, batch: Batch) -> tuple[mx.array, ...]:
        """Logprobs and entropies of the batch's tokens, and their KL to the teacher if that is in the loss.

        `[B, T]` float32 each.
        """
        bonus = self.loss.entropy_coef > 0
        if batch.teacher_coef is None:
            return batch_logprobs(self.policy, batch, bonus)
        assert self.teacher is not None, "a batch with a teacher's values needs the teacher"
        hidden, beside = batch_hidden(self.policy, batch), self.teacher.beside(self.policy, batch)
        return self.policy.hidden_logprobs(hidden, batch.token_ids, bonus, beside)

    def _measured(
        self, batch: Batch, logprobs: mx.array, entropies: mx.array, divergence: mx.array | None = None
    ) -> tuple[mx.array, Metrics]:
        """The batch's loss and its metrics.

        They are computed outside the compiled function: inside, each of about twenty metrics would be a separate
        kernel, which takes seconds to build on CUDA and saves microseconds.
        """
        custom = guarded(self.custom) if self.custom else None
        return policy_loss(logprobs, batch, self.loss, entropies, custom, divergence)
