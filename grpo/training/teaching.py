"""The teacher, and the values that it adds to a step's batches. The formulas are in `grpo.objective.teaching`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.ranks import Ranks
from grpo.config import TeacherConfig
from grpo.model.adapters import TEACHER
from grpo.model.head import Head
from grpo.model.logprobs import Beside, chunk_tokens, scaled
from grpo.model.pieces import in_pieces
from grpo.model.policy import ALL_TOKENS, KEEPS, Policy
from grpo.objective.teaching import exact_kl, likeliest, teacher_advantages, top_k_kl
from grpo.training.batches import forced_each, hidden_each
from grpo.types import Batch, Group


@dataclass(frozen=True, slots=True)
class Teacher:
    """A teacher: the state `TEACHER` of the policy's adapters, or a `second` model. It never changes."""

    cfg: TeacherConfig
    second: Policy | None = None

    @property
    def model(self) -> nn.Module | None:
        """The second model, if there is one."""
        return None if self.second is None else self.second.model

    @property
    def packs(self) -> bool:
        """Whether the teacher can read packed lines of completions, if the policy can."""
        return self.second is None or self.second.packs

    @property
    def notes(self) -> list[str]:
        """Notes on why a second model reads completions slowly."""
        slow = [] if self.second is None else self.second.slow
        # KEEPS and ALL_TOKENS concern the backward pass, which a teacher does not have
        return [f"teacher: {why}" for why in slow if not why.startswith((KEEPS, ALL_TOKENS))]

    @contextmanager
    def of(self, policy: Policy) -> Iterator[Policy]:
        """The teacher as a policy, for a `with` block. Do not use the policy itself in the block."""
        if self.second is not None:
            self.second.logits = policy.logits  # the plan's limit on logits in memory holds for the teacher too
            yield self.second
            return
        with policy.use(TEACHER):
            yield policy

    def teach(self, policy: Policy, batches: Sequence[Batch], ranks: Ranks) -> list[Batch]:
        """The batches with the teacher's values that the loss needs, from one forward pass of the teacher, no dropout.

        With `kl: sampled` they get the column `teacher`, and the teacher's advantages are added to `advantages`. With
        `exact` and `top_k` they get the fields `teacher_…` of `Batch`.
        """
        vocabulary = policy.vocabulary
        with self.of(policy) as teacher:
            if self.cfg.kl == "sampled":
                return list(map(self._advised, batches, forced_each(teacher, batches, ranks)))
            hidden = hidden_each(teacher, batches, ranks)
            coef = mx.array(self.cfg.coef)
            if self.cfg.kl == "exact":
                return [replace(b, teacher_coef=coef, teacher_hidden=h) for b, h in zip(batches, hidden, strict=True)]
            found = [self._likeliest(teacher, states, vocabulary) for states in hidden]
        return [
            replace(batch, teacher_coef=coef, teacher_ids=ids, teacher_logprobs=logprobs)
            for batch, (ids, logprobs) in zip(batches, found, strict=True)
        ]

    def _advised(self, batch: Batch, logprobs: mx.array) -> Batch:
        assert batch.behaviour is not None, "training needs rollouts with logprobs"
        advantages = teacher_advantages(batch.advantages, batch.behaviour, logprobs, self.cfg.coef)
        return replace(batch, teacher=logprobs, advantages=mx.where(batch.trained > 0, advantages, 0.0))

    def _likeliest(self, teacher: Policy, hidden: mx.array, vocabulary: int) -> tuple[mx.array, ...]:
        """The ids and logprobs that `likeliest` returns, `[B, T, …]`, from the teacher's hidden states."""
        head, chunk = _head(teacher), chunk_tokens(teacher.vocabulary, teacher.logits)

        def found(_: int, states: mx.array) -> tuple[mx.array, ...]:
            return likeliest(scaled(head(states), teacher.temperature), self.cfg.top_k, vocabulary)

        rows, length, width = hidden.shape
        of_all = in_pieces(found, hidden.reshape(rows * length, width), chunk, nn.Module(), {})
        columns = tuple(values.reshape(rows, length, -1) for values in of_all)
        mx.eval(columns)
        return columns

    def beside(self, policy: Policy, batch: Batch) -> Beside:
        """A function for `chunked_logprobs` that returns the KL to the teacher for a chunk of the policy's logits."""
        if batch.teacher_hidden is None:
            assert batch.teacher_ids is not None, "the teacher's pass adds the ids"
            assert batch.teacher_logprobs is not None, "the teacher's pass adds the logprobs"
            ids, logprobs = _flat(batch.teacher_ids), _flat(batch.teacher_logprobs)
            return lambda own, logits: top_k_kl(logits, ids[own], logprobs[own])
        states, teacher = _flat(batch.teacher_hidden), self.second or policy
        head, temperature = _head(teacher), policy.temperature

        return lambda own, logits: exact_kl(logits, scaled(head(states[own]), temperature))


def taught(groups: Sequence[Group]) -> list[Group]:
    """The groups, with all completions marked as taught: they are trained on even if their advantage is 0."""
    return [replace(group, rollouts=tuple(replace(r, taught=True) for r in group.rollouts)) for group in groups]


def _head(policy: Policy) -> Head:
    assert policy.split is not None, "a teacher in the loss needs a head that can be split off"
    return policy.split[1]


def _flat(columns: mx.array) -> mx.array:
    """Reshape `[B, T, n]` to `[B T, n]`."""
    return columns.reshape(-1, columns.shape[-1])
