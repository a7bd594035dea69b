"""Passes over a step's minibatches before its updates: each adds a column to the batches, or changes their weights.

A new pass is a function `(policy, minibatches, asked) -> minibatches`, and a row of `PASSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import mlx.core as mx

from grpo.backend.ranks import Ranks
from grpo.config import LossConfig
from grpo.model.adapters import REFERENCE
from grpo.model.policy import Policy
from grpo.objective import weights_of_chosen
from grpo.objective.masks import top_entropy_mask
from grpo.training.batches import MiniBatch, forced
from grpo.types import Batch


@dataclass(frozen=True, slots=True)
class Asked:
    """What decides which passes a run makes. `drops`: the update drops numbers of the adapter's inputs."""

    loss: LossConfig
    drops: bool = False
    ranks: Ranks = field(default_factory=Ranks)


Wanted = Callable[[Asked], bool]
Enrich = Callable[[Policy, Sequence[MiniBatch], Asked], list[MiniBatch]]
Pass = Callable[[Policy, Sequence[MiniBatch]], list[MiniBatch]]


def passes_of(asked: Asked) -> list[Pass]:
    """The passes that a run makes over every step's minibatches, in their order."""

    def bound(enrich: Enrich) -> Pass:
        return lambda policy, minibatches: enrich(policy, minibatches, asked)

    return [bound(enrich) for wanted, enrich in PASSES if wanted(asked)]


def with_top_entropy(policy: Policy, minibatches: Sequence[MiniBatch], asked: Asked) -> list[MiniBatch]:
    """The same minibatches with weight only on the step's trained tokens of highest entropy.

    The number of completions that a denominator counts stays the one of `make_batches`. The masks stay too: what is
    measured of a whole completion (its ratio, say) is measured of all its tokens.
    """
    everything = [batch for batches in minibatches for batch in batches]
    if not everything:
        return list(minibatches)
    entropies = mx.concatenate([forced(policy, batch)[1].reshape(-1) for batch in everything])
    trained = mx.concatenate([batch.trained.reshape(-1) for batch in everything])
    ends = list(accumulate(batch.trained.size for batch in everything))
    parts = mx.split(top_entropy_mask(entropies, trained, asked.loss.top_entropy_quantile), ends[:-1])
    chosen = iter(part.reshape(batch.trained.shape) for part, batch in zip(parts, everything, strict=True))
    return [_with_weights(batches, [next(chosen) for _ in batches], asked.loss) for batches in minibatches]


def shared(policy: Policy, minibatches: Sequence[MiniBatch], asked: Asked) -> list[MiniBatch]:
    """This process's part of every minibatch. What comes before sees the whole step, what comes after its part."""
    del policy
    return [asked.ranks.share(batches) for batches in minibatches]


def with_reference(policy: Policy, minibatches: Sequence[MiniBatch], asked: Asked) -> list[MiniBatch]:
    """The same minibatches with the reference's logprobs in the batches that have a penalty now."""
    del asked
    if not any(batch.beta is not None for batches in minibatches for batch in batches):
        return list(minibatches)
    with policy.use(REFERENCE):
        return [[replace(batch, reference=forced(policy, batch)[0]) for batch in batches] for batches in minibatches]


def with_anchor(policy: Policy, minibatches: Sequence[MiniBatch], asked: Asked) -> list[MiniBatch]:
    """The same minibatches with the policy's logprobs as it is now, before the step's first update.

    The first minibatch needs none: its logprobs when it is reached are these, unless its update drops numbers of the
    adapter's inputs. Then each has the entropies of the same pass too: those that the update sees are another policy's.
    """
    if asked.drops:
        return [[_whole(policy, batch) for batch in batches] for batches in minibatches]
    others = [[replace(b, anchor=forced(policy, b)[0]) for b in batches] for batches in minibatches[1:]]
    return [*minibatches[:1], *others]


def _whole(policy: Policy, batch: Batch) -> Batch:
    logprobs, entropies = forced(policy, batch)
    return replace(batch, anchor=logprobs, entropies=entropies)


PASSES: list[tuple[Wanted, Enrich]] = [
    (lambda asked: asked.loss.top_entropy_quantile < 1, with_top_entropy),
    (lambda asked: asked.ranks.size > 1, shared),
    (lambda asked: asked.loss.kl_in == "loss", with_reference),
    (lambda _: True, with_anchor),
]
"""When a pass is made, and the pass. The anchor comes last: nothing after it may move the policy."""


def _with_weights(batches: MiniBatch, chosen: Sequence[mx.array], loss: LossConfig) -> MiniBatch:
    """A minibatch with weight on the tokens alone that were chosen of each batch, `[B, T]`."""
    moved = weights_of_chosen([batch.weights for batch in batches], chosen, loss)
    return [replace(batch, weights=weights) for batch, weights in zip(batches, moved, strict=True)]
