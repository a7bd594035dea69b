"""The update: the same gradient for every split, nothing for what teaches nothing."""

import math
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from training.sections import (
    make_batches,
    make_minibatches,
    updater,
    with_advantages,
    with_anchor,
    with_reference,
    with_top_entropy,
)

from grpo.backend import device
from grpo.config import Recipe
from grpo.errors import RunError
from grpo.training import packing
from grpo.training.batches import batch_logprobs
from grpo.types import Batch, Group, Rollout, Task, Trajectory


def recipe(**sections) -> Recipe:
    base = {
        "model": {"name": "m"},
        "data": {"source": "d"},
        "rewards": [{"use": "r"}],
        "optim": {"steps": 10, "learning_rate": 1e-3},
        "rollout": {"max_completion_length": 8},
    }
    sections["optim"] = {**base["optim"], "micro_batch_tokens": 40, **sections.get("optim", {})}
    return Recipe.model_validate({**base, **sections}, strict=False)


def groups(policy, uniform: bool = False) -> list[Group]:
    """Three groups of four with ragged lengths; with `uniform` the middle one's rewards are all equal."""
    rewards = [[1, 0, 0.5, 1], [1, 1, 1, 1] if uniform else [0, 1, 2, 3], [0, 0, 1, 0]]
    made = []
    for g, (length, scores) in enumerate(zip([3, 9, 5], rewards, strict=True)):
        prompt = tuple(range(10 * g + 5, 10 * g + 5 + length))
        rollouts = []
        for i, score in enumerate(scores):
            ids = tuple(100 + 7 * g + 3 * i + t for t in range(1 + (5 * i + g) % 8))
            forced, _ = policy.logprobs(mx.array([[*prompt, *ids]]), mx.array([length]), mx.array([ids]))
            completion = Trajectory.sampled(ids, tuple(forced[0].tolist()), "", "stop")
            rollouts.append(Rollout(completion, {"r": float(score)}))
        made.append(Group(Task(g, "?", prompt, {}), tuple(rollouts)))
    return made


def gradient(policy, cfg: Recipe, uniform: bool = False, keep_all: bool = False) -> dict[str, mx.array]:
    scored = with_advantages(groups(policy, uniform), cfg)
    if keep_all:  # an advantage that is not exactly zero keeps a row in
        rolls = [
            replace(g, rollouts=tuple(replace(r, advantage=r.advantage or 1e-30) for r in g.rollouts)) for g in scored
        ]
        scored = rolls
    batches = with_reference(make_batches(scored, cfg), policy, cfg)
    return updater(policy, cfg).gradient(batches).arrays


def real_rows(batch: Batch) -> int:
    """How many of a batch's rows are completions, and no padding."""
    return int((batch.trained.sum(axis=1) > 0).sum().item())


def difference(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """The largest difference between the numbers of two gradients, whose norm is about 1."""
    assert 0.1 < math.sqrt(sum((array**2).sum().item() for array in one.values())) < 3
    return max(mx.abs(one[path] - other[path]).max().item() for path in one)


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_the_gradient_does_not_depend_on_the_split(make_policy, kind: str, beta: float) -> None:
    policy = make_policy().policy
    found = [
        gradient(policy, recipe(loss={"type": kind, "beta": beta}, optim={"steps": 1, "micro_batch_tokens": size}))
        for size in (999, 40, 1)
    ]
    assert difference(found[0], found[1]) < 1e-6
    assert difference(found[0], found[2]) < 1e-6


@pytest.mark.parametrize("tokens", [100, 999])
def test_padding_to_few_shapes_changes_nothing(make_policy, monkeypatch, tokens: int) -> None:
    policy, cfg = make_policy().policy, recipe(optim={"micro_batch_tokens": tokens})
    exact = gradient(policy, cfg)
    monkeypatch.setattr(packing, "on_gpu", lambda: True)
    monkeypatch.setattr(packing, "GPU_MULTIPLE", 8)
    assert difference(exact, gradient(policy, cfg)) < 1e-6


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_groups_without_variance_are_skipped_without_changing_the_gradient(make_policy, kind: str) -> None:
    policy, cfg = make_policy().policy, recipe(loss={"type": kind})
    scored = with_advantages(groups(policy, uniform=True), cfg)
    assert sum(map(real_rows, make_batches(scored, cfg))) == 8
    assert difference(gradient(policy, cfg, uniform=True), gradient(policy, cfg, uniform=True, keep_all=True)) < 1e-6


def test_with_a_penalty_no_row_is_skipped(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(loss={"beta": 0.1})
    scored = with_advantages(groups(policy, uniform=True), cfg)
    assert sum(map(real_rows, make_batches(scored, cfg))) == 12


def test_the_gradient_is_that_of_the_definition(make_policy) -> None:
    """Against the loss written out sequence by sequence, by finite differences of one parameter."""
    policy, cfg = make_policy().policy, recipe(advantage={"scale_rewards": "none"})
    path = "model.layers.1.mlp.down_proj.lora_b"
    scored = with_advantages(groups(policy), cfg)
    tokens = sum(len(r.trajectory.token_ids) for g in scored for r in g.rollouts)

    def loss() -> float:  # on policy the gradient of the clipped loss is that of -A·logprob
        total = 0.0
        for g in scored:
            for r in g.rollouts:
                prompt, ids = g.task.prompt_ids, r.trajectory.token_ids
                logits = policy.model(mx.array([[*prompt, *ids]]))[0].astype(mx.float32)
                rows = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                picked = [rows[len(prompt) - 1 + t, token].item() for t, token in enumerate(ids)]
                total -= r.advantage * math.fsum(picked)
        return total / tokens

    analytic = gradient(policy, cfg)[path]
    at = mx.argmax(mx.abs(analytic)).item()
    row, column = divmod(at, analytic.shape[1])
    before, step = policy.adapters.state()[path], 1e-2
    values = []
    for sign in (1, -1):
        moved = before + 0
        moved[row, column] += sign * step
        policy.adapters.load_state({path: moved})
        values.append(loss())
    policy.adapters.load_state({path: before})
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(analytic[row, column].item(), rel=1e-2)


def test_nothing_to_learn_from_gives_a_gradient_of_zeros(make_policy) -> None:
    policy = make_policy().policy
    update = updater(policy, recipe())
    before = policy.adapters.state()
    assert update([[]], 1).grad_norm == 0
    assert all(mx.array_equal(array, before[path]) for path, array in policy.adapters.state().items())


def stepped(policy, cfg: Recipe):
    scored = with_advantages(groups(policy), cfg)
    return updater(policy, cfg)(make_minibatches(scored, cfg), 1)


def test_the_ratio_is_one_at_the_first_update_and_moves_at_the_second(make_policy) -> None:
    once = stepped(make_policy().policy, recipe())
    assert once.metrics["clip_ratio/region_mean"] == 0
    twice = stepped(make_policy().policy, recipe(optim={"steps": 1, "num_iterations": 2, "learning_rate": 0.05}))
    assert twice.metrics["clip_ratio/region_mean"] > 0


def test_the_gradient_is_clipped_to_its_norm_and_reported_before(make_policy) -> None:
    free = stepped(make_policy().policy, recipe(optim={"steps": 1, "max_grad_norm": 1e6}))
    tight = stepped(make_policy().policy, recipe(optim={"steps": 1, "max_grad_norm": 1e-9}))
    assert tight.grad_norm == pytest.approx(free.grad_norm, rel=1e-6)


def test_only_the_adapter_moves_and_all_of_its_layers_do(make_policy) -> None:
    policy = make_policy().policy
    before = dict(tree_flatten(policy.model.parameters()))
    stepped(policy, recipe())
    after = dict(tree_flatten(policy.model.parameters()))
    moved = {path for path, array in after.items() if not mx.array_equal(array, before[path])}
    assert moved == set(policy.adapters.state())


@pytest.mark.skipif(shutil.which("g++") is None, reason="mx.compile on a CPU calls a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_as_on_a_gpu_the_gradient_is_the_same(make_policy, monkeypatch, checkpointing: bool) -> None:
    cfg = recipe(loss={"beta": 0.1})
    plain = gradient(make_policy().policy, cfg)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    mx.enable_compile()
    try:
        policy = make_policy().policy
        policy.gradient_checkpointing = checkpointing
        assert difference(plain, gradient(policy, cfg)) < 1e-5
        stepped(policy, recipe())  # the model holds arrays again, not the trace's
        mx.eval(policy.model.parameters())
    finally:
        mx.disable_compile()


@pytest.mark.skipif(shutil.which("g++") is None, reason="mx.compile on a CPU calls a C++ compiler")
def test_a_compiled_gradient_leaves_the_very_arrays_that_were_there(make_policy, monkeypatch) -> None:
    """A decoder knows weights by their objects: of others it would make a second copy of all layers in each step."""
    cfg = recipe()
    plain = gradient(make_policy().policy, cfg)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    mx.enable_compile()
    try:
        policy = make_policy().policy
        batches = make_batches(with_advantages(groups(policy), cfg), cfg)
        assert len(batches) > 1
        gradients = updater(policy, cfg).gradients
        gradients.alone = True  # as on a GPU: one micro-batch after the other
        before = tree_flatten(policy.model.parameters(), destination={})
        assert difference(plain, gradients(batches).arrays) < 1e-5
        after = tree_flatten(policy.model.parameters(), destination={})
    finally:
        mx.disable_compile()
    assert before.keys() == after.keys()
    assert [path for path, array in after.items() if array is not before[path]] == []


def test_the_reference_is_the_base_model(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(loss={"beta": 0.5})
    base = make_policy(trained=False).policy
    scored = with_advantages(groups(policy), cfg)
    for batch in with_reference(make_batches(scored, cfg), policy, cfg):
        expected, _ = batch_logprobs(base, batch)
        now, _ = batch_logprobs(policy, batch)
        assert mx.allclose(batch.reference, expected, atol=1e-5)
        assert not mx.allclose(batch.reference, now, atol=1e-3)
        assert batch.beta.item() == 0.5


class Recorder:
    """In the optimizer's place: notes what it is given."""

    def __init__(self) -> None:
        self.state: dict = {}
        self.seen: list[tuple[float, float]] = []

    def update(self, model, gradients, scale) -> None:
        norm = math.sqrt(sum(((array * scale) ** 2).sum().item() for array in gradients.values()))
        self.seen.append((self.learning_rate, norm))


def test_the_optimizer_gets_the_clipped_gradient_at_the_scheduled_rate(make_policy) -> None:
    policy = make_policy().policy
    cfg = recipe(optim={"steps": 4, "warmup_steps": 2, "learning_rate": 0.5, "max_grad_norm": 0.01})
    update = updater(policy, cfg)
    update.optimizer = Recorder()
    minibatches = make_minibatches(with_advantages(groups(policy), cfg), cfg)
    for step in (1, 2):
        update(minibatches, step)
    assert update.optimizer.seen == [(0.25, pytest.approx(0.01, rel=1e-3)), (0.5, pytest.approx(0.01, rel=1e-3))]


def test_weight_decay_shrinks_the_weights(make_policy) -> None:
    ends = []
    for decay in (0.0, 0.5):
        policy = make_policy().policy
        before = policy.adapters.state()
        stepped(policy, recipe(optim={"steps": 1, "learning_rate": 0.1, "weight_decay": decay}))
        ends.append(policy.adapters.state())
    assert all(mx.allclose(ends[0][path] - ends[1][path], 0.05 * before[path], atol=1e-6) for path in before)


def test_several_minibatches_are_updates_of_their_own_with_ratios_to_before_the_first(make_policy) -> None:
    policy = make_policy().policy
    cfg = recipe(optim={"steps": 1, "num_minibatches": 3, "learning_rate": 0.05}, rollout={"prompts_per_step": 3})
    minibatches = make_minibatches(with_advantages(groups(policy), cfg), cfg)
    assert [sum(map(real_rows, part)) for part in minibatches] == [4, 4, 4]
    ready = with_anchor(minibatches, policy, cfg)
    assert all(batch.anchor is None for batch in ready[0])
    for batch in ready[1] + ready[2]:
        now, _ = batch_logprobs(policy, batch)
        assert mx.allclose(batch.anchor, now, atol=1e-6)
    assert updater(policy, cfg)(ready, 1).metrics["clip_ratio/region_mean"] > 0  # the later ones are off policy


def test_overlong_filtering_leaves_rows_out_of_numerator_and_denominator(make_policy) -> None:
    policy = make_policy().policy
    cfg = recipe(loss={"type": "dapo", "mask_truncated_completions": True})
    whole = with_advantages(groups(policy), cfg)
    first = whole[0].rollouts[0]
    cut = replace(first, trajectory=replace(first.trajectory, finish_reason="length"))
    marked = [replace(whole[0], rollouts=(cut, *whole[0].rollouts[1:])), *whole[1:]]
    masks = [batch.trained.sum().item() for batch in make_batches(marked, cfg)]
    tokens = sum(len(r.trajectory.token_ids) for g in whole for r in g.rollouts)
    assert sum(masks) == tokens - len(first.trajectory.token_ids)
    assert sum(batch.weights.sum().item() for batch in make_batches(marked, cfg)) == pytest.approx(1, abs=1e-6)


def test_top_entropy_keeps_the_fraction_of_the_step_whatever_the_split(make_policy) -> None:
    policy, found = make_policy().policy, []
    for size in (999, 40, 1):
        cfg = recipe(loss={"top_entropy_quantile": 0.3}, optim={"steps": 1, "micro_batch_tokens": size})
        batches = make_batches(with_advantages(groups(policy), cfg), cfg)
        (cut,) = with_top_entropy([batches], policy, cfg)
        assert all(mx.array_equal(one.trained, other.trained) for one, other in zip(cut, batches, strict=True))
        kept, there = (sum((batch.weights > 0).sum().item() for batch in part) for part in (cut, batches))
        assert kept == math.ceil(0.3 * there)
        assert sum(batch.weights.sum().item() for batch in cut) == pytest.approx(1, abs=1e-6)
        found.append(updater(policy, cfg).gradient(cut).arrays)
    assert max(mx.abs(found[0][path] - found[2][path]).max().item() for path in found[0]) < 1e-6


def test_bnpo_averages_each_micro_batch_over_its_own_tokens(make_policy) -> None:
    policy = make_policy().policy
    cfg = recipe(loss={"type": "bnpo"}, optim={"steps": 1, "micro_batch_tokens": 40})
    batches = make_batches(with_advantages(groups(policy), cfg), cfg)
    assert [batch.weights.sum().item() for batch in batches] == pytest.approx([1 / 3] * 3)


def test_an_entropy_bonus_has_the_entropys_gradient(make_policy) -> None:
    policy = make_policy().policy
    trees = []
    for settings in ({}, {"entropy_coef": 1.0}):
        cfg = recipe(loss=settings, optim={"steps": 1, "micro_batch_tokens": 999})
        trees.append(gradient(policy, cfg))
        (batch,) = make_batches(with_advantages(groups(policy), cfg), cfg)

    def entropy(model) -> mx.array:
        del model
        _, values = batch_logprobs(policy, batch, entropy_gradient=True)
        return (values * batch.weights).sum()

    _, bonus = nn.value_and_grad(policy.model, entropy)(policy.model)
    for path, array in tree_flatten(bonus):
        assert mx.allclose(trees[1][path], trees[0][path] - array, atol=1e-5)


def test_a_loss_of_ones_own(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(optim={"steps": 1, "micro_batch_tokens": 999})
    (batch,) = make_batches(with_advantages(groups(policy), cfg), cfg)

    def mine(logprobs, batch, cfg):
        assert batch.anchor.shape == batch.advantages.shape == logprobs.shape
        return -mx.exp(mx.stop_gradient(logprobs) - batch.anchor) * batch.advantages * logprobs

    same = updater(policy, recipe(loss={"type": "rloo"}, optim={"steps": 1, "micro_batch_tokens": 999})).gradient(
        [batch]
    )
    own = updater(policy, cfg, mine).gradient([batch])
    assert own.loss == pytest.approx(same.loss)
    assert own.loss != pytest.approx(updater(policy, cfg).gradient([batch]).loss)


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        (
            lambda logprobs, batch, cfg: batch.nothing,
            "'nothing'. A batch has .*, trained, .*, anchor, ",
        ),
        (lambda logprobs, batch, cfg: cfg.nothing, "has no attribute 'nothing'$"),
        (lambda logprobs, batch, cfg: logprobs.sum(), "not an array of the logprobs' shape"),
        (lambda logprobs, batch, cfg: 1.0, "returned float"),
    ],
)
def test_a_loss_of_ones_own_that_will_not_do(make_policy, mine, said: str) -> None:
    policy, cfg = make_policy().policy, recipe()
    minibatches = make_minibatches(with_advantages(groups(policy), cfg), cfg)
    with pytest.raises(RunError, match=said):
        updater(policy, cfg, mine)(minibatches, 1)


@pytest.mark.parametrize("iterations", [1, 2])
def test_dppos_ratio_is_to_the_sampler_and_the_sampler_is_measured(make_policy, iterations: int) -> None:
    """The sampler's logprobs are off by 0.25 nats: for the gradient, and for the metrics of every pass."""
    policy = make_policy().policy
    cfg = recipe(loss={"type": "dppo"}, optim={"num_iterations": iterations, "learning_rate": 1e-7})
    off = [
        [replace(batch, behaviour=batch.behaviour - 0.25) for batch in batches]
        for batches in make_minibatches(with_advantages(groups(policy), cfg), cfg)
    ]
    measured = updater(policy, cfg)(off, 1)
    assert measured.metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.25, abs=1e-4)
    reinforce = recipe(loss={"type": "reinforce++"})
    plain = updater(policy, reinforce).gradient(off[0]).arrays
    weighed = updater(policy, cfg).gradient(off[0]).arrays
    assert max(mx.abs(weighed[path] - math.exp(0.25) * plain[path]).max().item() for path in plain) < 1e-5


def test_a_step_of_truncated_completions_alone_measures_nothing_infinite(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(loss={"mask_truncated_completions": True})
    cut = [
        replace(
            g, rollouts=tuple(replace(r, trajectory=replace(r.trajectory, finish_reason="length")) for r in g.rollouts)
        )
        for g in with_advantages(groups(policy), cfg)
    ]
    update = updater(policy, cfg)(make_minibatches(cut, cfg), 1)
    assert (update.grad_norm, update.metrics) == (0, {})


def test_the_reference_has_no_kl_at_first(make_policy) -> None:
    policy, cfg = make_policy(trained=False).policy, recipe(loss={"beta": 0.5})
    scored = with_advantages(groups(policy), cfg)
    batches = with_reference(make_batches(scored, cfg), policy, cfg)
    assert updater(policy, cfg).gradient(batches).metrics["kl"] == 0


def test_without_beta_no_reference_is_computed(make_policy, monkeypatch) -> None:
    policy, cfg = make_policy().policy, recipe()
    batches = make_batches(with_advantages(groups(policy), cfg), cfg)
    monkeypatch.setattr(policy, "use", None)  # calling it would fail
    assert all(batch.reference is None for batch in with_reference(batches, policy, cfg))
