"""A teacher beside what else a step may have: other ways to train, a reference, shared prompts, passes, lanes."""

from __future__ import annotations

import mlx.core as mx
import pytest
from conftest import make_model, shaken
from training.test_teachers import (
    FORMS,
    difference,
    enriched,
    expected,
    gradient,
    policy_of,
    recipe,
    scored,
    teacher_of,
)

from grpo.backend import lanes
from grpo.config import AdapterConfig
from grpo.model.adapters import POLICY, REFERENCE, TEACHER, Adapters
from grpo.model.policy import Policy
from grpo.training.teaching import Teacher
from grpo.training.update import Updater


def policy_with(kind: str, **adapter) -> Policy:
    """A policy over a model of this kind, which trains what `adapter` says, some way from where it began."""
    model = make_model(kind, **({"hidden_size": 64} if kind == "quantised" else {}))
    adapters = Adapters(model, AdapterConfig(**adapter), mx.random.key(0))
    moved = shaken(adapters.state())
    adapters.load_state({path: array + moved[path] / 3 for path, array in adapters.state().items()})
    return Policy(model, adapters, 0.9)


@pytest.mark.parametrize(
    ("kind", "adapter", "kl", "model"),
    [
        ("untied", {"type": "dora", "rank": 4}, "exact", False),
        ("untied", {"type": "dora", "rank": 4}, "sampled", False),
        ("quantised", {"rank": 4}, "exact", False),
        ("quantised", {"rank": 4}, "top_k", True),
        ("tied", {"type": "full"}, "sampled", False),
        ("tied", {"type": "full"}, "top_k", False),
        ("untied", {"type": "full"}, "exact", True),
    ],
)
def test_other_ways_to_train_learn_from_a_teacher(kind: str, adapter: dict, kl: str, model: bool) -> None:
    """The gradient against the whole vocabulary; where weights train themselves, so does the head."""
    policy, cfg = policy_with(kind, **adapter), recipe(kl)
    teacher, made = teacher_of(cfg, policy, model), scored(policy, cfg)
    found, wanted = gradient(policy, cfg, teacher, made), expected(policy, teacher, cfg, made)
    assert difference(found.arrays, wanted) < 1e-5


@pytest.mark.parametrize("kl", FORMS)
def test_a_reference_and_a_teacher_of_one_base(kl: str) -> None:
    """Each is its own state: what the penalty adds to the gradient is what it adds without a teacher."""
    policy = policy_of()
    found = {}
    for beta in (0.0, 0.5):
        for coef in ("taught", "alone"):
            cfg = recipe(kl, loss={"beta": beta})
            teacher, made = teacher_of(cfg, policy, False), scored(policy, cfg)
            if coef == "alone":
                cfg = cfg.model_copy(update={"teacher": None})
                minibatches = enriched(policy, cfg, None, made)
                found[beta, coef] = Updater(policy, cfg.optim, cfg.loss).gradient(minibatches[0])
            else:
                found[beta, coef] = gradient(policy, cfg, teacher, made)
    added = {
        coef: {path: array - found[0.0, coef].arrays[path] for path, array in found[0.5, coef].arrays.items()}
        for coef in ("taught", "alone")
    }
    assert difference(added["taught"], added["alone"]) < 1e-4
    assert found[0.5, "taught"].metrics["kl"] == pytest.approx(found[0.5, "alone"].metrics["kl"], abs=1e-6)
    assert policy.adapters.active == POLICY
    assert {REFERENCE, TEACHER} <= set(policy.adapters.names)


@pytest.mark.each_value
@pytest.mark.parametrize("kl", FORMS)
@pytest.mark.parametrize("model", [False, True])
def test_shared_prompts_change_nothing(kl: str, model: bool) -> None:
    """Neither those of the policy, nor those of a second model."""
    found = []
    for shares in (True, False):
        policy, cfg = policy_of(share_prompts=shares), recipe(kl)
        teacher = teacher_of(cfg, policy, model)
        if teacher.second is not None:
            teacher = Teacher(teacher.cfg, Policy(teacher.second.model, teacher.second.adapters, 0.9, shares))
        found.append(gradient(policy, cfg, teacher, scored(policy, cfg)).arrays)
    assert difference(*found) < 1e-5


@pytest.mark.parametrize("kl", ["exact", "top_k"])
def test_a_second_pass_has_the_kl_of_the_policy_as_it_has_become(kl: str) -> None:
    """With `num_iterations: 2` the teacher is asked once; the policy's own probabilities are of now."""
    policy, cfg = policy_of(), recipe(kl, rewards=False)
    teacher, made = teacher_of(cfg, policy, False), scored(policy, cfg)
    updater = Updater(policy, cfg.optim, cfg.loss, teacher=teacher)
    seen = updater.gradient(enriched(policy, cfg, teacher, made)[0]).batches
    policy.adapters.load_state({path: 1.2 * array for path, array in policy.adapters.state().items()})
    again = updater.gradient(seen)
    assert difference(again.arrays, expected(policy, teacher, cfg, made)) < 1e-5


def test_a_second_pass_keeps_the_advantages_of_the_first() -> None:
    """The ratio is to the policy before the step's first update, and the advantage is of that policy, too."""
    policy, cfg = policy_of(), recipe("sampled", rewards=False, loss={"epsilon": 0.99, "epsilon_high": 99.0})
    teacher, made = teacher_of(cfg, policy, False), scored(policy, cfg)
    updater = Updater(policy, cfg.optim, cfg.loss, teacher=teacher)
    first = updater.gradient(enriched(policy, cfg, teacher, made)[0])
    before = [batch.advantages for batch in first.batches]
    policy.adapters.load_state({path: 1.2 * array for path, array in policy.adapters.state().items()})
    again = updater.gradient(first.batches)
    assert all(mx.array_equal(one.advantages, was) for one, was in zip(again.batches, before, strict=True))
    assert again.metrics["teacher/kl"] == pytest.approx(first.metrics["teacher/kl"], abs=1e-6)
    loss = 0.0  # - mean of ratio × advantage, by hand
    tokens = sum(batch.trained.sum().item() for batch in again.batches)
    for batch, found in zip(again.batches, first.batches, strict=True):
        prompts = batch.prompt_ids, batch.prompt_lengths, batch.prompt_index
        now, _ = policy.group_logprobs(*prompts, batch.token_ids)
        ratio = mx.exp(mx.where(batch.trained > 0, now - found.anchor, 0.0))
        loss -= (ratio * batch.advantages * batch.trained).sum().item() / tokens
    assert again.loss == pytest.approx(loss, abs=1e-5)
    assert again.loss != pytest.approx(first.loss, abs=1e-3)


@pytest.mark.each_value
@pytest.mark.parametrize("kl", FORMS)
@pytest.mark.parametrize("model", [False, True])
def test_lanes_change_nothing(kl: str, model: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cores in (1, 3):
        monkeypatch.setattr(lanes, "cpu_cores", lambda cores=cores: cores)
        policy, cfg = policy_of(), recipe(kl, optim={"micro_batch_tokens": 16})
        teacher = teacher_of(cfg, policy, model)
        found.append(gradient(policy, cfg, teacher, scored(policy, cfg), parts=3))
    alone, together = found
    assert all(mx.array_equal(array, together.arrays[path]) for path, array in alone.arrays.items())


@pytest.mark.parametrize("kl", FORMS)
def test_entropies_with_a_gradient_beside_the_kl(kl: str) -> None:
    """The bonus adds to the gradient what it adds without a teacher: neither takes the other's slopes."""
    policy, found = policy_of(), {}
    for bonus in (0.0, 0.3):
        for taught in (True, False):
            cfg = recipe(kl, loss={"entropy_coef": bonus})
            teacher, made = teacher_of(cfg, policy, False), scored(policy, cfg)
            if taught:
                found[bonus, taught] = gradient(policy, cfg, teacher, made).arrays
            else:
                minibatches = enriched(policy, cfg, None, made)
                found[bonus, taught] = Updater(policy, cfg.optim, cfg.loss).gradient(minibatches[0]).arrays
    added = [{path: array - found[0.0, t][path] for path, array in found[0.3, t].items()} for t in (True, False)]
    assert difference(*added) < 1e-4
