"""The update: the same gradient for every split, nothing for what teaches nothing."""

import math
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from grpo.backend import device
from grpo.config import Recipe
from grpo.errors import RunError
from grpo.objective.groups import with_advantages
from grpo.training.batches import make_batches, make_minibatches, with_reference
from grpo.training.update import Updater
from grpo.types import Completion, Group, Rollout, Task


def recipe(**sections) -> Recipe:
    base = {
        "model": {"name": "m"},
        "data": {"source": "d"},
        "rewards": [{"use": "r"}],
        "optim": {"steps": 10, "learning_rate": 1e-3},
        "rollout": {"max_completion_length": 8},
    }
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
            completion = Completion(ids, tuple(forced[0].tolist()), "", "stop")
            rollouts.append(Rollout(completion, {"r": float(score)}))
        made.append(Group(Task(g, "?", prompt, {}), tuple(rollouts)))
    return made


def gradient(
    policy, cfg: Recipe, uniform: bool = False, pad_to: int = 1, keep_all: bool = False
) -> dict[str, mx.array]:
    scored = with_advantages(groups(policy, uniform), cfg)
    if keep_all:  # an advantage that is not exactly zero keeps a row in
        rolls = [
            replace(g, rollouts=tuple(replace(r, advantage=r.advantage or 1e-30) for r in g.rollouts)) for g in scored
        ]
        scored = rolls
    batches = with_reference(make_batches(scored, cfg, pad_to), policy, cfg.loss.beta, cfg)
    return dict(tree_flatten(Updater(policy, cfg).gradient(batches).tree))


def difference(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """The largest difference between the numbers of two gradients, whose norm is about 1."""
    assert 0.3 < math.sqrt(sum((array**2).sum().item() for array in one.values())) < 3
    return max(mx.abs(one[path] - other[path]).max().item() for path in one)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_the_gradient_does_not_depend_on_the_split(make_policy, kind: str, beta: float) -> None:
    policy = make_policy().policy
    found = [
        gradient(policy, recipe(loss={"type": kind, "beta": beta}, optim={"steps": 1, "micro_batch_size": size}))
        for size in (12, 4, 1)
    ]
    assert difference(found[0], found[1]) < 1e-6
    assert difference(found[0], found[2]) < 1e-6


def test_padding_wider_changes_nothing(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe()
    assert difference(gradient(policy, cfg), gradient(policy, cfg, pad_to=32)) < 1e-6


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_groups_without_variance_are_skipped_without_changing_the_gradient(make_policy, kind: str) -> None:
    policy, cfg = make_policy().policy, recipe(loss={"type": kind})
    scored = with_advantages(groups(policy, uniform=True), cfg)
    assert sum(batch.tokens.shape[0] for batch in make_batches(scored, cfg)) == 8
    assert difference(gradient(policy, cfg, uniform=True), gradient(policy, cfg, uniform=True, keep_all=True)) < 1e-6


def test_with_a_penalty_no_row_is_skipped(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(loss={"beta": 0.1})
    scored = with_advantages(groups(policy, uniform=True), cfg)
    assert sum(batch.tokens.shape[0] for batch in make_batches(scored, cfg)) == 12


def test_the_gradient_is_that_of_the_definition(make_policy) -> None:
    """Against the loss written out sequence by sequence, by finite differences of one parameter."""
    policy, cfg = make_policy().policy, recipe(advantage={"scale_rewards": "none"})
    path = "model.layers.1.mlp.down_proj.lora_b"
    scored = with_advantages(groups(policy), cfg)
    tokens = sum(len(r.completion.token_ids) for g in scored for r in g.rollouts)

    def loss() -> float:  # on policy the gradient of the clipped loss is that of -A·logprob
        total = 0.0
        for g in scored:
            for r in g.rollouts:
                prompt, ids = g.task.prompt_ids, r.completion.token_ids
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
    update = Updater(policy, recipe())
    before = policy.adapters.state()
    assert update([[]], 1).grad_norm == 0
    assert all(mx.array_equal(array, before[path]) for path, array in policy.adapters.state().items())


def stepped(policy, cfg: Recipe):
    scored = with_advantages(groups(policy), cfg)
    return Updater(policy, cfg)(make_minibatches(scored, cfg), 1)


def test_the_ratio_is_one_at_the_first_update_and_moves_at_the_second(make_policy) -> None:
    once = stepped(make_policy().policy, recipe())
    assert once.metrics["clip_ratio/region_mean"] == 0
    twice = stepped(make_policy().policy, recipe(optim={"steps": 1, "num_iterations": 2, "learning_rate": 0.05}))
    assert twice.metrics["clip_ratio/region_mean"] > 0


def test_the_gradient_is_clipped_to_its_norm_and_reported_before(make_policy) -> None:
    free = stepped(make_policy().policy, recipe(optim={"steps": 1, "max_grad_norm": 1e9}))
    tight = stepped(make_policy().policy, recipe(optim={"steps": 1, "max_grad_norm": 1e-9}))
    assert tight.grad_norm == pytest.approx(free.grad_norm, rel=1e-6)


def test_only_the_adapter_moves_and_all_of_its_layers_do(make_policy) -> None:
    policy = make_policy().policy
    before = dict(tree_flatten(policy.model.parameters()))
    stepped(policy, recipe())
    after = dict(tree_flatten(policy.model.parameters()))
    moved = {path for path, array in after.items() if not mx.array_equal(array, before[path])}
    assert moved == set(policy.adapters.state())


def test_what_is_not_finite_is_not_applied(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe()
    (batch,) = make_batches(with_advantages(groups(policy), cfg), recipe(optim={"steps": 1, "micro_batch_size": 12}))
    before = policy.adapters.state()
    with pytest.raises(RunError, match=r"step 3: .* not finite"):
        Updater(policy, cfg)([[replace(batch, weights=batch.weights * math.inf)]], 3)
    assert all(mx.array_equal(array, before[path]) for path, array in policy.adapters.state().items())


def test_compiled_as_on_a_gpu_the_gradient_is_the_same(make_policy, monkeypatch) -> None:
    cfg = recipe(loss={"beta": 0.1})
    plain = gradient(make_policy().policy, cfg)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    mx.enable_compile()
    try:
        policy = make_policy().policy
        assert difference(plain, gradient(policy, cfg, pad_to=8)) < 1e-5
        stepped(policy, recipe())  # the model holds arrays again, not the trace's
        mx.eval(policy.model.parameters())
    finally:
        mx.disable_compile()


def test_the_reference_has_no_kl_at_first(make_policy) -> None:
    policy, cfg = make_policy(trained=False).policy, recipe(loss={"beta": 0.5})
    scored = with_advantages(groups(policy), cfg)
    batches = with_reference(make_batches(scored, cfg), policy, cfg.loss.beta, cfg)
    assert Updater(policy, cfg).gradient(batches).metrics["kl"] == 0


def test_without_beta_no_reference_is_computed(make_policy, monkeypatch) -> None:
    policy, cfg = make_policy().policy, recipe()
    batches = make_batches(with_advantages(groups(policy), cfg), cfg)
    monkeypatch.setattr(policy, "use", None)  # calling it would fail
    assert all(batch.ref_logprobs is None for batch in with_reference(batches, policy, 0.0, cfg))
