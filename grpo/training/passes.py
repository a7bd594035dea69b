"""Passes over a step's minibatches before its updates: each pass adds a column to the batches or changes weights.

To add a pass, write a function `(policy, minibatches, settings) -> minibatches` and give it a row in `PASSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from grpo.backend.ranks import Ranks
from grpo.config import LossConfig
from grpo.errors import RunError
from grpo.model.adapters import REFERENCE
from grpo.model.policy import Policy
from grpo.objective import weights_of_chosen
from grpo.objective.masks import top_entropy_threshold
from grpo.training.batches import Found, MiniBatch, forced_each, forced_each_with_entropies
from grpo.training.teaching import Teacher
from grpo.types import Batch


@dataclass(frozen=True, slots=True)
class PassSettings:
    """Settings of the passes. `dropout`: whether the update applies dropout to the adapter's inputs. `teacher`: None
    for a run without a teacher."""

    loss: LossConfig
    dropout: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    teacher: Teacher | None = None


_OF_TOKENS = frozenset(Batch.__slots__) - {"prompt_ids", "prompt_lengths", "prompt_index", "beta", "lines", "starts"}
_OF_TOKENS -= {"teacher_coef", "teacher_hidden", "teacher_ids", "teacher_logprobs"}
Condition = Callable[[PassSettings], bool]
Enrich = Callable[[Policy, Sequence[MiniBatch], PassSettings], list[MiniBatch]]
Pass = Callable[[Policy, Sequence[MiniBatch]], list[MiniBatch]]


def passes_of(settings: PassSettings) -> list[Pass]:
    """The passes that every step of a run makes, in order. A pass raises RunError if its result has a wrong shape."""

    def bound(enrich: Enrich) -> Pass:
        def made(policy: Policy, minibatches: Sequence[MiniBatch]) -> list[MiniBatch]:
            return _checked(enrich(policy, minibatches, settings), len(minibatches), enrich)

        return made

    return [bound(enrich) for needed, enrich in PASSES if needed(settings)]


def _checked(made: Any, number: int, enrich: Enrich) -> list[MiniBatch]:
    """The result of a pass, checked: `number` lists of batches, whose per-token columns are all `[B, T]`."""
    name = getattr(enrich, "__name__", type(enrich).__name__)
    if not isinstance(made, list) or len(made) != number or not all(isinstance(batches, list) for batches in made):
        got = f"{len(made)} of them" if isinstance(made, list) and len(made) != number else f"{made!r:.60}"
        raise RunError(f"pass {name}: it must return {number} minibatches, each a list of batches; it returned {got}")
    for batch in (batch for batches in made for batch in batches):
        if not isinstance(batch, Batch):
            raise RunError(f"pass {name}: a minibatch must be a list of grpo.Batch; it contains {batch!r:.60}")
        for column, array in batch.arrays().items():
            if column in _OF_TOKENS and array.shape != batch.token_ids.shape:
                raise RunError(
                    f"pass {name}: its column {column} has shape {array.shape}, but needs the shape of the batch's "
                    f"tokens, {batch.token_ids.shape}: one value for each token"
                )
    return made


def with_top_entropy(policy: Policy, minibatches: Sequence[MiniBatch], settings: PassSettings) -> list[MiniBatch]:
    """Keep weight only on the trained tokens of the step with the highest entropy (arXiv 2506.01939).

    The number of completions in the denominators stays as `make_batches` counted it. `trained` stays too, so that
    sequence ratios and metrics still cover whole completions. Each process measures its own share, and all processes
    use the same threshold.
    """
    entropies = [
        [entropies for _, entropies in forced_each_with_entropies(policy, batches, settings.ranks)]
        for batches in minibatches
    ]
    pairs = [pair for both in zip(minibatches, entropies, strict=True) for pair in zip(*both, strict=True)]
    mine = [np.array(found)[np.array(batch.trained) > 0] for batch, found in pairs]
    everyone = settings.ranks.gather(np.concatenate([np.zeros(0, np.float32), *mine]))
    least = top_entropy_threshold(np.concatenate(everyone), settings.loss.top_entropy_quantile)
    return [
        _with_weights(
            batches,
            [(values >= least) & (batch.trained > 0) for batch, values in zip(batches, found, strict=True)],
            settings,
        )
        for batches, found in zip(minibatches, entropies, strict=True)
    ]


def shared(policy: Policy, minibatches: Sequence[MiniBatch], settings: PassSettings) -> list[MiniBatch]:
    """Keep only this rank's share of every minibatch for the following passes."""
    del policy
    return [settings.ranks.share(batches) for batches in minibatches]


def with_reference(policy: Policy, minibatches: Sequence[MiniBatch], settings: PassSettings) -> list[MiniBatch]:
    """Add the column `reference`, unless the weight of the KL penalty is 0 at this step."""
    if not any(batch.beta is not None for batches in minibatches for batch in batches):
        return list(minibatches)
    with policy.use(REFERENCE):
        return [
            [replace(b, reference=reference) for b, reference in _with(forced_each, policy, batches, settings)]
            for batches in minibatches
        ]


def with_teacher(policy: Policy, minibatches: Sequence[MiniBatch], settings: PassSettings) -> list[MiniBatch]:
    """Add the teacher's values for the batches' tokens: the column `teacher` and its advantages, or what the loss needs
    for a KL over the vocabulary."""
    assert settings.teacher is not None, "the pass's condition ensures this"
    return [settings.teacher.teach(policy, batches, settings.ranks) for batches in minibatches]


def with_anchor(policy: Policy, minibatches: Sequence[MiniBatch], settings: PassSettings) -> list[MiniBatch]:
    """Add the column `anchor`: logprobs under the policy before the step's first update.

    The first minibatch needs no pass, because its own update starts from that policy and computes the same logprobs.
    With dropout the update computes different logprobs and entropies, so every minibatch gets `anchor` and `entropies`
    from a pass without dropout.
    """
    if settings.dropout:
        return [
            [
                replace(b, anchor=logprobs, entropies=entropies)
                for b, (logprobs, entropies) in _with(forced_each_with_entropies, policy, batches, settings)
            ]
            for batches in minibatches
        ]
    others = [
        [replace(b, anchor=anchor) for b, anchor in _with(forced_each, policy, batches, settings)]
        for batches in minibatches[1:]
    ]
    return [*minibatches[:1], *others]


def _with(
    measure: Callable[[Policy, MiniBatch, Ranks], list[Found]], policy: Policy, batches: MiniBatch, to: PassSettings
) -> Iterator[tuple[Batch, Found]]:
    """Each batch with its measurement."""
    return zip(batches, measure(policy, batches, to.ranks), strict=True)


PASSES: list[tuple[Condition, Enrich]] = [
    (lambda settings: settings.ranks.size > 1, shared),
    (lambda settings: settings.loss.top_entropy_quantile < 1, with_top_entropy),
    (lambda settings: settings.loss.kl_in == "loss", with_reference),
    (lambda settings: settings.teacher is not None, with_teacher),
    (lambda _: True, with_anchor),
]
"""The condition of each pass, and the pass, in the order of a step."""


def _with_weights(batches: MiniBatch, chosen: Sequence[mx.array], settings: PassSettings) -> MiniBatch:
    """Move a minibatch's weights to the chosen tokens: a mask `[B, T]` for each batch."""
    moved = weights_of_chosen([batch.weights for batch in batches], chosen, settings.loss, settings.ranks.sum)
    return [replace(batch, weights=weights) for batch, weights in zip(batches, moved, strict=True)]
