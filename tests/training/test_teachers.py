"""A teacher in a step: what batches get, the gradient against the whole vocabulary, micro-batches, lines and holes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import make_model, shaken
from mlx.utils import tree_flatten
from training.holes import made as with_holes
from training.sections import make_minibatches, with_advantages
from training.test_lines_in_a_step import in_lines  # noqa: F401  a fixture
from training.test_update import groups
from training.test_update import recipe as sections

from grpo.config import AdapterConfig, Recipe
from grpo.model.adapters import TEACHER, Adapters, NoAdapters
from grpo.model.policy import Policy
from grpo.training.gradients import Gradient
from grpo.training.passes import PassSettings, passes_of
from grpo.training.teaching import Teacher, taught
from grpo.training.update import Updater
from grpo.types import Batch, Group


def difference(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """The largest difference between the numbers of two gradients, over the largest number."""
    largest = max(mx.abs(array).max().item() for array in other.values())
    assert largest > 1e-3
    return max(mx.abs(one[path] - other[path]).max().item() for path in other) / largest


FORMS = ["sampled", "exact", "top_k"]
COEF = 0.7


def policy_of(kind: str = "tied", **settings) -> Policy:
    model = make_model(kind)
    adapters = Adapters(model, AdapterConfig(rank=4), mx.random.key(0))
    adapters.load_state(shaken(adapters.state()))
    return Policy(model, adapters, 0.9, **settings)


@pytest.fixture
def policy() -> Policy:
    return policy_of()


def second() -> Policy:
    """A wider model with other weights, of which nothing trains, and more padding behind its vocabulary."""
    model = make_model("untied", hidden_size=32, vocab_size=160)
    model.freeze()
    return Policy(model, NoAdapters(model), 0.9)


def recipe(kl: str, rewards: bool = True, **changed) -> Recipe:
    teacher = {"adapter": "unused", "kl": kl, "coef": COEF, **({"top_k": 5} if kl == "top_k" else {})}
    return sections(teacher=teacher, **({} if rewards else {"rewards": []}), **changed)


def teacher_of(cfg: Recipe, policy: Policy, model: bool) -> Teacher:
    assert cfg.teacher is not None
    if model:
        return Teacher(cfg.teacher, second())
    policy.adapters.add(TEACHER, {path: array + 0.03 for path, array in policy.adapters.state().items()})
    return Teacher(cfg.teacher)


def enriched(policy: Policy, cfg: Recipe, teacher: Teacher, made: Sequence[Group], parts: int = 1) -> list[list[Batch]]:
    minibatches = make_minibatches(taught(made), cfg, parts)
    for enrich in passes_of(PassSettings(cfg.loss, cfg.adapter.dropout > 0, teacher=teacher)):
        minibatches = enrich(policy, minibatches)
    return minibatches


def gradient(policy: Policy, cfg: Recipe, teacher: Teacher, made: Sequence[Group], parts: int = 1) -> Gradient:
    (batches,) = enriched(policy, cfg, teacher, made, parts)
    return Updater(policy, cfg.optim, cfg.loss, teacher=teacher).gradient(batches)


def scored(policy: Policy, cfg: Recipe) -> list[Group]:
    return with_advantages(groups(policy), cfg) if cfg.rewards else groups(policy)


def logits_of(policy: Policy, prompt: Sequence[int], ids: Sequence[int]) -> mx.array:
    """All logits that predict a completion: what the code under test never holds."""
    logits = policy.model(mx.array([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
    return logits.astype(mx.float32) / policy.temperature


def expected(policy: Policy, teacher: Teacher, cfg: Recipe, made: Sequence[Group]) -> dict[str, mx.array]:
    """The gradient of the mean over tokens of -A r + coef · KL, with the whole vocabulary at once."""
    rows = [(group.task, rollout) for group in made for rollout in group.rollouts]
    kept = {}
    for number, (task, rollout) in enumerate(rows):
        with teacher.of(policy) as other:
            kept[number] = logits_of(other, task.prompt_ids, rollout.trajectory.token_ids)
            mx.eval(kept[number])
    tokens = sum(rollout.trajectory.trained_tokens for _, rollout in rows)

    def loss(_: nn.Module) -> mx.array:
        total = mx.array(0.0)
        for number, (task, rollout) in enumerate(rows):
            ids = rollout.trajectory.token_ids
            mine = nn.log_softmax(logits_of(policy, task.prompt_ids, ids))
            theirs = nn.log_softmax(kept[number][:, : mine.shape[-1]])
            of_tokens = mx.take_along_axis(mine, mx.array(ids)[:, None], 1)[:, 0]
            advantage = mx.full(of_tokens.shape, rollout.advantage)
            if cfg.teacher.kl == "sampled":
                whole = nn.log_softmax(kept[number])
                said = mx.take_along_axis(whole, mx.array(ids)[:, None], 1)[:, 0]
                advantage = advantage + COEF * (said - mx.array(rollout.trajectory.behaviour))
                kl = mx.zeros(of_tokens.shape)
            else:
                kl = _divergence(mine, theirs, 5 if cfg.teacher.kl == "top_k" else None)
            per_token = -advantage * mx.exp(of_tokens - mx.stop_gradient(of_tokens)) + COEF * kl
            total = total + mx.where(mx.array(rollout.trajectory.trained), per_token, 0.0).sum() / tokens
        return total

    _, found = nn.value_and_grad(policy.model, loss)(policy.model)
    return tree_flatten(found, destination={})


def _divergence(mine: mx.array, theirs: mx.array, k: int | None) -> mx.array:
    if k is None:
        return (mx.exp(mine) * (mine - theirs)).sum(-1)
    order = mx.argsort(-theirs, -1)
    inside, outside = order[:, :k], order[:, k:]
    merged = [
        mx.concatenate(
            [mx.take_along_axis(x, inside, 1), mx.logsumexp(mx.take_along_axis(x, outside, 1), -1, keepdims=True)], 1
        )
        for x in (mine, theirs)
    ]
    return (mx.exp(merged[0]) * (merged[0] - merged[1])).sum(-1)


@pytest.mark.each_value
@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize("kl", FORMS)
@pytest.mark.parametrize("rewards", [True, False])
def test_the_gradient_is_that_of_the_whole_vocabulary(policy, kl: str, rewards: bool, model: bool) -> None:
    """Beside rewards and alone, by another adapter and by another model, which pads its vocabulary differently."""
    cfg = recipe(kl, rewards)
    teacher, made = teacher_of(cfg, policy, model), scored(policy, cfg)
    found = gradient(policy, cfg, teacher, made)
    wanted = expected(policy, teacher, cfg, made)
    assert difference(found.arrays, wanted) < 1e-5
    assert abs(found.metrics["teacher/kl"]) > 0.01


@pytest.mark.parametrize("kl", FORMS)
def test_micro_batches_and_few_logits_at_once_change_nothing(policy, kl: str) -> None:
    cfg = recipe(kl)
    teacher, made = teacher_of(cfg, policy, kl == "exact"), scored(policy, cfg)
    whole = gradient(policy, cfg, teacher, made)
    policy.logits = 16 * 128
    cut = gradient(policy, recipe(kl, optim={"micro_batch_tokens": 16}), teacher, made, parts=3)
    assert difference(whole.arrays, cut.arrays) < 1e-6
    assert cut.metrics["teacher/kl"] == pytest.approx(whole.metrics["teacher/kl"], abs=1e-5)
    with teacher.of(policy) as asked:
        assert asked.logits == policy.logits  # a second model, too, holds no more at once than the plan has


@pytest.mark.parametrize("kl", FORMS)
def test_tokens_of_an_environment_teach_nothing(policy, kl: str) -> None:
    """They are read, by the teacher too, and have no divergence."""
    cfg = recipe(kl, rewards=False)
    teacher, made = teacher_of(cfg, policy, False), with_holes(policy)
    for batch in enriched(policy, cfg, teacher, made)[0]:
        assert not mx.where(batch.trained > 0, 0.0, batch.advantages).any()
    found, wanted = gradient(policy, cfg, teacher, made), expected(policy, teacher, cfg, made)
    assert difference(found.arrays, wanted) < 1e-5


@pytest.mark.parametrize("kl", FORMS)
def test_completions_behind_one_another(policy, kl: str, in_lines) -> None:  # noqa: F811
    cfg = recipe(kl)
    teacher, made = teacher_of(cfg, policy, True), scored(policy, cfg)
    alone = gradient(policy, cfg, teacher, made)
    in_lines()
    assert teacher.packs
    batches = enriched(policy, cfg, teacher, made)
    assert all(batch.lines is not None for of_one in batches for batch in of_one)
    assert difference(alone.arrays, gradient(policy, cfg, teacher, made).arrays) < 1e-6


def test_a_teacher_that_is_the_policy_teaches_nothing(policy) -> None:
    """Nor does the state that was active change."""
    for kl in FORMS:
        cfg = recipe(kl, rewards=False)
        policy.adapters.add(TEACHER, policy.adapters.state())
        before = policy.adapters.state()
        found = gradient(policy, cfg, Teacher(cfg.teacher), scored(policy, cfg))
        assert max(mx.abs(array).max().item() for array in found.arrays.values()) < 1e-6
        assert found.metrics["teacher/kl"] == pytest.approx(0, abs=1e-6)
        assert all(mx.array_equal(array, before[path]) for path, array in policy.adapters.state().items())


def test_rows_without_an_advantage_learn_from_a_teacher_alone(policy) -> None:
    cfg = recipe("sampled")
    uniform = with_advantages(groups(policy, uniform=True), cfg)
    rows = lambda made: sum((b.trained.sum(axis=1) > 0).sum().item() for bs in make_minibatches(made, cfg) for b in bs)  # noqa: E731
    assert rows(uniform) == 8
    assert rows(taught(uniform)) == 12
    cut = [
        replace(
            g, rollouts=tuple(replace(r, trajectory=replace(r.trajectory, finish_reason="length")) for r in g.rollouts)
        )
        for g in taught(uniform)
    ]
    masked = recipe("sampled", loss={"mask_truncated_completions": True})
    assert make_minibatches(cut, masked) == [[]]  # what the loss leaves out, the teacher leaves out, too


def test_the_teacher_sees_no_dropout_and_every_update_of_a_step_has_it(policy) -> None:
    """With several minibatches each has the column, and the anchor beside it."""
    cfg = recipe("top_k", optim={"num_minibatches": 2})
    made = scored(policy, cfg)
    batches = enriched(policy, cfg, teacher_of(cfg, policy, False), made)
    assert len(batches) == 2
    for batch in (batch for of_one in batches for batch in of_one):
        assert batch.teacher_ids is not None
        assert batch.teacher_ids.shape == (*batch.token_ids.shape, 5)
        assert batch.teacher_logprobs is not None
        assert batch.teacher_logprobs.shape == (*batch.token_ids.shape, 6)
    assert [next(batch.anchor is None for batch in of_one) for of_one in batches] == [True, False]
