"""Loads and checks the teacher that a recipe names, before the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo.config import AdapterConfig, TeacherConfig
from grpo.errors import UserError
from grpo.model.adapters import TEACHER, NoAdapters
from grpo.model.load import load
from grpo.model.policy import Policy
from grpo.training.teaching import Teacher


def teacher_of(cfg: TeacherConfig | None, adapter: AdapterConfig, policy: Policy, tokenizer: Any) -> Teacher | None:
    """The recipe's teacher; None if there is none. It is a second model, or a state that is added to the policy's
    adapters.

    Raises UserError for an adapter that does not fit the model, for a model with another tokenizer, and if the KL to
    the teacher cannot be a term of the loss.
    """
    if cfg is None:
        return None
    if cfg.adapter is not None:
        _add_state(policy, Path(cfg.adapter))
        teacher = Teacher(cfg)
    else:
        teacher = Teacher(cfg, _second(cfg, policy, tokenizer))
    if cfg.in_loss:
        _check_heads(teacher, adapter, policy)
    return teacher


def _add_state(policy: Policy, folder: Path) -> None:
    try:
        policy.adapters.add(TEACHER, policy.adapters.read(folder, "learn from it"))
    except UserError as error:
        raise UserError(f"teacher.{error}") from None


def _second(cfg: TeacherConfig, policy: Policy, tokenizer: Any) -> Policy:
    assert cfg.model is not None
    model, its_own = load(cfg.model)
    if (difference := _difference(tokenizer.get_vocab(), its_own.get_vocab())) is not None:
        raise UserError(
            f"teacher.model: {cfg.model.name} has a different tokenizer than the trained model: {difference}. The "
            "teacher reads the tokens that the policy samples: choose a model with the same tokenizer"
        )
    second = Policy(model, NoAdapters(model), policy.temperature, policy.share_prompts)
    if second.vocabulary < len(tokenizer.get_vocab()):
        raise UserError(f"teacher.model: {cfg.model.name} has fewer logits than its tokenizer has tokens")
    return second


def _difference(mine: dict[str, int], other: dict[str, int]) -> str | None:
    """How two vocabularies differ, shown by the first token that differs; None if they are equal."""
    odd = sorted((place, token) for token, place in mine.items() ^ other.items())
    if not odd:
        return None
    token = odd[0][1]
    ids = [f"id {vocabulary[token]}" if token in vocabulary else "missing" for vocabulary in (mine, other)]
    return f"token {token!r}: {ids[1]} in the teacher's vocabulary, {ids[0]} in the trained model's"


def _check_heads(teacher: Teacher, adapter: AdapterConfig, policy: Policy) -> None:
    """Raise UserError if the KL cannot be computed from hidden states in chunks of tokens."""
    sampled = "Use teacher.kl: sampled"
    if policy.split is None or (teacher.second is not None and teacher.second.split is None):
        model = "the model" if policy.split is None else "the teacher"
        raise UserError(
            f"teacher.kl: {teacher.cfg.kl} projects hidden states in chunks, but grpo cannot separate the output head "
            f"of {model}. {sampled}"
        )
    if teacher.cfg.kl == "exact" and teacher.second is None and adapter.type == "full":
        raise UserError(
            "teacher.kl: exact with teacher.adapter needs an output head that is not trained, but adapter.type: full "
            f"may train it. {sampled}, or top_k"
        )
