"""Who teaches, and what a step's batches get from the teacher. The formulas are in `grpo.objective.teaching`."""

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
    """A teacher: the state `TEACHER` of the policy's own adapters, or a `second` model, which never changes."""

    cfg: TeacherConfig
    second: Policy | None = None

    @property
    def model(self) -> nn.Module | None:
        """The second model, if there is one."""
        return None if self.second is None else self.second.model

    @property
    def packs(self) -> bool:
        """Whether completions may go through it behind one another, wherever they may go so through the policy."""
        return self.second is None or self.second.packs

    @property
    def notes(self) -> list[str]:
        """What there is to say of how a second model reads completions."""
        slow = [] if self.second is None else self.second.slow
        return [f"teacher: {why}" for why in slow if not why.startswith((KEEPS, ALL_TOKENS))]  # it has no backward pass

    @contextmanager
    def of(self, policy: Policy) -> Iterator[Policy]:
        """The policy's teacher inside a `with` block. The policy is not to be used in it."""
        if self.second is not None:
            self.second.logits = policy.logits  # as few at once as the plan has for the policy
            yield self.second
            return
        with policy.use(TEACHER):
            yield policy

    def teach(self, policy: Policy, batches: Sequence[Batch], ranks: Ranks) -> list[Batch]:
        """The batches with what the loss needs of the teacher, from one forward pass of it, without dropout.

        `sampled`: the column `teacher`, and the advantages that it gives added to `advantages`. `exact`, `top_k`: the
        fields `teacher_…` of `Batch`.
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
        """The ids and logprobs that `likeliest` gives, `[B, T, …]`, by the teacher's hidden states."""
        head, chunk = _head(teacher), chunk_tokens(teacher.vocabulary, teacher.logits)

        def found(_: int, states: mx.array) -> tuple[mx.array, ...]:
            return likeliest(scaled(head(states), teacher.temperature), self.cfg.top_k, vocabulary)

        rows, length, width = hidden.shape
        of_all = in_pieces(found, hidden.reshape(rows * length, width), chunk, nn.Module(), {})
        columns = tuple(values.reshape(rows, length, -1) for values in of_all)
        mx.eval(columns)
        return columns

    def beside(self, policy: Policy, batch: Batch) -> Beside:
        """What a chunk of the policy's logits is compared with: its KL to the teacher, for `chunked_logprobs`."""
        if batch.teacher_hidden is None:
            assert batch.teacher_ids is not None, "the pass of the teacher has given it"
            assert batch.teacher_logprobs is not None, "with its logprobs"
            ids, logprobs = _flat(batch.teacher_ids), _flat(batch.teacher_logprobs)
            return lambda own, logits: top_k_kl(logits, ids[own], logprobs[own])
        states, teacher = _flat(batch.teacher_hidden), self.second or policy
        head, temperature = _head(teacher), policy.temperature

        return lambda own, logits: exact_kl(logits, scaled(head(states[own]), temperature))


def taught(groups: Sequence[Group]) -> list[Group]:
    """The same groups, whose completions all learn, whatever their advantages."""
    return [replace(group, rollouts=tuple(replace(r, taught=True) for r in group.rollouts)) for group in groups]


def _head(policy: Policy) -> Head:
    assert policy.split is not None, "a teacher in the loss needs a head that can be split off"
    return policy.split[1]


def _flat(columns: mx.array) -> mx.array:
    """`[B, T, n]` as `[B T, n]`."""
    return columns.reshape(-1, columns.shape[-1])
