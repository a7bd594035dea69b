"""The teacher that a recipe names: found, loaded and checked before the run."""

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
    """The recipe's teacher: a state of the policy's adapters, which is added to them, or a second model.

    None without one. Raises UserError for an adapter that does not fit the model, a model with another tokenizer, and
    where its KL cannot be a term of the loss.
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
            f"teacher.model: {cfg.model.name} has another tokenizer than the model that is trained: {difference}. A "
            "teacher reads the very tokens that the policy samples: take a model with the same tokenizer"
        )
    second = Policy(model, NoAdapters(model), policy.temperature, policy.share_prompts)
    if second.vocabulary < len(tokenizer.get_vocab()):
        raise UserError(f"teacher.model: {cfg.model.name} has no logits for all tokens of its tokenizer")
    return second


def _difference(mine: dict[str, int], other: dict[str, int]) -> str | None:
    """How two vocabularies differ, by their first token that does; None if they do not."""
    odd = sorted((place, token) for token, place in mine.items() ^ other.items())
    if not odd:
        return None
    token = odd[0][1]
    ids = [str(vocabulary.get(token, "missing")) for vocabulary in (mine, other)]
    return f"token {token!r} is {ids[0]} here and {ids[1]} there"


def _check_heads(teacher: Teacher, adapter: AdapterConfig, policy: Policy) -> None:
    """Raise UserError where the KL cannot be computed from hidden states, some tokens at a time."""
    sampled = "Take teacher.kl: sampled"
    if policy.split is None or (teacher.second is not None and teacher.second.split is None):
        whose = "the model" if policy.split is None else "the teacher"
        raise UserError(
            f"teacher.kl: {teacher.cfg.kl} projects hidden states, and {whose} has no head that can be "
            f"split off. {sampled}"
        )
    if teacher.cfg.kl == "exact" and teacher.second is None and adapter.type == "full":
        raise UserError(
            "teacher.kl: exact with teacher.adapter needs a head that does not train, and adapter.type: "
            f"full may train it. {sampled}, or top_k"
        )
