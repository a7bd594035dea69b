"""What rewards, penalties and baselines make of a step's groups before the update sees them."""

import math
from dataclasses import replace

import mlx.core as mx
import pytest
from training.sections import make_batches, weights, with_advantages, with_penalties, with_reference
from training.test_update import groups, recipe

from grpo.objective.groups import with_rewards


def test_the_penalty_in_the_reward(make_policy) -> None:
    policy = make_policy().policy
    cfg = recipe(loss={"beta": 0.5, "kl_in": "reward"}, advantage={"soft_overlong_cache": 4, "scale_rewards": "none"})
    plain = with_rewards(groups(policy), weights(groups(policy), cfg))
    penalised, told = with_penalties(plain, policy, cfg, 0.5)
    base, divergences, penalties, tokens = make_policy(trained=False).policy, 0.0, [], 0
    for group in penalised:
        for rollout in group.rollouts:
            ids = rollout.trajectory.token_ids
            prompt = group.task.prompt_ids
            reference, _ = base.logprobs(mx.array([[*prompt, *ids]]), mx.array([len(prompt)]), mx.array([ids]))
            d = reference[0] - mx.array(rollout.trajectory.behaviour)
            overlong = max(0, len(ids) - 4) / 4
            divergence = (mx.exp(d) - d - 1).sum().item()
            assert rollout.penalty == pytest.approx(0.5 * divergence + overlong, abs=1e-4)
            divergences, tokens = divergences + divergence, tokens + len(ids)
            penalties.append(rollout.penalty)
    assert told == {
        "kl": pytest.approx(divergences / tokens, abs=1e-4),
        "reward_penalty": pytest.approx(sum(penalties) / 12),
    }
    scored = with_advantages(penalised, cfg)
    net = [r.reward - r.penalty for r in penalised[0].rollouts]
    assert [r.advantage for r in scored[0].rollouts] == pytest.approx([x - sum(net) / 4 for x in net], abs=1e-5)
    (batch,) = make_batches(scored[:1], cfg)
    assert with_reference([batch], policy, cfg)[0].reference is None  # it is not in the loss as well


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_the_loss_brings_baseline_and_scaling_of_its_advantages(make_policy, kind: str) -> None:
    cfg = recipe(loss={"type": kind})
    (group, *_) = with_advantages(groups(make_policy().policy), cfg)  # rewards 1, 0, 0.5, 1
    got = [rollout.advantage for rollout in group.rollouts]
    centred = [r - 0.625 for r in (1, 0, 0.5, 1)]
    if kind == "rloo":
        assert got == pytest.approx([4 / 3 * c for c in centred], abs=1e-6)
    else:
        deviation = math.sqrt(sum(c * c for c in centred) / 3)
        assert got == pytest.approx([c / (deviation + 1e-4) for c in centred], abs=1e-5)


def test_without_penalties_groups_stay_as_they_are(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(loss={"beta": 0.5})
    plain = groups(policy)
    assert with_penalties(plain, policy, cfg, 0.5) == (plain, {})


def test_a_penalty_for_length_alone_tells_no_kl(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(advantage={"soft_overlong_cache": 4})
    _, told = with_penalties(groups(policy), policy, cfg, 0.0)
    lengths = [1 + (5 * i + g) % 8 for g in range(3) for i in range(4)]
    assert told == {"reward_penalty": pytest.approx(sum(max(0, n - 4) / 4 for n in lengths) / 12)}


def test_a_completion_that_a_function_failed_on_leaves_the_baseline(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(advantage={"scale_rewards": "none"})
    (group, *_) = groups(policy)
    failed = replace(group, rollouts=(replace(group.rollouts[0], failed=True), *group.rollouts[1:]))
    (got,) = with_advantages(with_rewards([failed], weights([failed], cfg)), cfg)
    assert got.rollouts[0].reward is None
    assert [r.advantage for r in got.rollouts] == pytest.approx([0, -0.5, 0, 0.5])  # rewards -, 0, 0.5, 1
