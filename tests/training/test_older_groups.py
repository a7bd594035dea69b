"""`rollout.reuse`: older groups in the place of those that teach nothing, never learnt from as if they were new."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from objective.oracle import loss_and_gradient
from training.sections import gauges, with_penalties
from training.test_update import recipe as sections

from grpo.config import Recipe
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare
from grpo.scoring.scorer import Scorer
from grpo.training.batches import forced
from grpo.training.gauges import Gauges
from grpo.training.older import OlderGroups, lagging
from grpo.training.trainer import Trainer
from grpo.types import Group, Rollout, StepMetrics, Task, Trajectory

VARIED, EQUAL = [0, 1, 1, 1], [1, 1, 1, 1]


def trainer_of(recipe, rewards: Sequence[list[float]], *overrides: str) -> Trainer:
    """A trainer of two groups a step, whose rewards are given: a list for each time that completions are scored."""
    trainer = prepare(load_recipe(recipe, ["optim.steps=9", *overrides])).trainer
    calls = iter(rewards)
    trainer.scorer = Scorer({"digits": lambda **_: next(calls)})
    return trainer


def lags(metrics: StepMetrics) -> list[int]:
    return [group.lag for group in metrics.groups]


def sampled_at(groups: Sequence[Group]) -> list[int | None]:
    return [group.rollouts[0].trajectory.policy_step for group in groups]


def test_an_older_group_takes_the_place_of_one_that_teaches_nothing(recipe) -> None:
    trainer = trainer_of(recipe, [VARIED + VARIED, EQUAL + VARIED], "rollout.reuse=2")
    first, second = trainer.step(1), trainer.step(2)
    assert (lags(first), lags(second)) == ([0, 0], [0, 1, 0])  # fresh, replayed, and sampled but not learnt from
    told = {name: second.values[name] for name in ("policy_lag/mean", "policy_lag/max", "reuse/groups")}
    assert told == {"policy_lag/mean": 0.5, "policy_lag/max": 1, "reuse/groups": 1}
    assert first.values["reuse/groups"] == first.values["policy_lag/max"] == 0
    _, replayed, left = second.groups
    assert replayed.rollouts[0].trajectory in [group.rollouts[0].trajectory for group in first.groups]
    assert all(rollout.has_advantage for rollout in replayed.rollouts)
    assert sorted(rollout.reward for rollout in replayed.rollouts) == [0, 1, 1, 1]
    assert not any(rollout.has_advantage for rollout in left.rollouts)
    assert len(second.sampled) == 2


def test_a_replayed_group_is_not_counted_as_sampled(recipe, monkeypatch) -> None:
    trainer = trainer_of(recipe, [VARIED + VARIED, EQUAL + EQUAL], "rollout.reuse=1", "log.kl=1")
    observed, measured = [], []
    trainer.tasks.observe = observed.extend
    monkeypatch.setattr(Gauges, "divergences", lambda _, groups: measured.extend(groups) or [0.0])
    trainer.step(1)
    metrics = trainer.step(2)
    fresh = [rollout.trajectory for group in metrics.groups[2:] for rollout in group.rollouts]
    assert {trajectory.policy_step for trajectory in fresh} == {1}
    assert metrics.values["num_tokens"] == sum(trajectory.trained_tokens for trajectory in fresh)
    assert (metrics.values["num_prompts"], metrics.values["frac_reward_zero_std"]) == (2, 1)
    assert metrics.values["reward"] == 1
    assert metrics.values["grad_norm"] > 0
    assert sampled_at(observed) == [0, 0, 1, 1]
    assert not [name for name in metrics.values if name.startswith("sampling/")]  # no gap of stale rows is told
    assert sampled_at(measured) == [0, 0, 1, 1]  # `kl` is of what the step sampled


def test_nothing_older_than_the_bound_is_replayed(recipe) -> None:
    calls = [VARIED + VARIED, EQUAL + EQUAL, EQUAL + EQUAL, EQUAL + EQUAL]
    for bound, expected in ((0, [0, 0, 0]), (1, [1, 0, 0]), (2, [1, 2, 0])):
        trainer = trainer_of(recipe, calls, f"rollout.reuse={bound}")
        steps = [trainer.step(n) for n in (1, 2, 3, 4)]
        assert [max(lags(step)) for step in steps[1:]] == expected
        assert [step.values["grad_norm"] > 0 for step in steps[1:]] == [lag > 0 for lag in expected]
        assert ("reuse/groups" in steps[0].values) == (bound > 0)
        assert trainer.older.kept == ()


def test_fresh_prompts_come_before_older_groups(recipe) -> None:
    calls = [VARIED + VARIED, EQUAL + EQUAL, VARIED + EQUAL, EQUAL]
    trainer = trainer_of(recipe, calls, "rollout.reuse=1", "rollout.dynamic_sampling=2")
    trainer.step(1)
    metrics = trainer.step(2)
    assert lags(metrics) == [0, 1, 0, 0, 0, 0]
    assert metrics.values["num_prompts"] == 5


@pytest.mark.quick_cases("loss.beta=0.1 loss.top_entropy_quantile=0.5", "loss.type=dppo")
@pytest.mark.parametrize(
    "settings",
    [
        ["loss.beta=0.1", "loss.top_entropy_quantile=0.5"],
        ["loss.type=gspo", "optim.micro_batch_tokens=64"],
        ["loss.type=vespo"],
        ["loss.type=dppo"],
        ["rollout.top_k=5", "loss.importance_sampling_correction=token_truncate"],
    ],
    ids=" ".join,
)
def test_every_update_of_a_step_is_the_oracles(recipe, settings: list[str]) -> None:
    """Two minibatches, of which one mixes fresh and stale rows, twice; the policy moves far in between."""
    overrides = ["optim.learning_rate=0.02", "optim.num_iterations=2", "optim.num_minibatches=2", "rollout.reuse=3"]
    overrides += ["rollout.prompts_per_step=4", "data.shuffle=false"]
    calls = [VARIED * 4, VARIED + EQUAL + VARIED * 2]
    trainer = trainer_of(recipe, calls, *overrides, *settings)
    trainer.step(1)
    made, gradient = [], trainer.update.gradient

    def noted(batches, key=None):
        current = [forced(trainer.policy, batch) for batch in batches]
        made.append((list(zip(batches, current, strict=True)), gradient(batches, key)))
        return made[-1][1]

    trainer.update.gradient = noted
    metrics = trainer.step(2)
    assert lags(metrics)[:4] == [0, 0, 0, 1]
    assert len(made) == 4
    starts: dict[int, list[np.ndarray]] = {}
    moved = []
    for number, (pairs, found) in enumerate(made):
        expected = 0.0
        for place, (batch, current) in enumerate(pairs):
            old = np.array(anchor_of(starts, number, place, batch, current), np.float64)
            lp, stale = np.array(current, np.float64), np.array(stale_of(batch))
            behaviour = np.array(batch.behaviour, np.float64)
            anchor = np.where(stale > 0, behaviour, old)
            moved += np.abs((lp - anchor)[np.array(batch.trained) > 0]).tolist()
            known = {"mask": np.array(batch.trained), "weights": np.array(batch.weights, np.float64), "anchor": anchor}
            known |= {"advantages": np.array(batch.advantages)[:, 0], "behaviour": behaviour}
            known |= {} if batch.reference is None else {"reference": np.array(batch.reference, np.float64)}
            known |= {} if batch.sampler is None else {"sampler": np.array(batch.sampler, np.float64)}
            cfg = trainer.cfg.loss
            chosen = {"beta": cfg.beta, "importance_sampling_correction": cfg.importance_sampling_correction}
            expected += loss_and_gradient(cfg.type, lp, known, chosen)[0]
        assert found.loss == pytest.approx(expected, abs=1e-6, rel=2e-6), number
    assert max(moved) > 0.05
    assert any(batch.stale is not None for pairs, _ in made for batch, _ in pairs)


def stale_of(batch) -> mx.array:
    return mx.zeros(batch.trained.shape) if batch.stale is None else batch.stale


def anchor_of(starts: dict, number: int, place: int, batch, current) -> mx.array:
    """The batch's logprobs before the step's first update: its own column, or what its first pass computes."""
    return starts.setdefault((number % 2, place), current if batch.anchor is None else batch.anchor)


def test_a_failed_step_leaves_the_older_groups_as_they_were(recipe) -> None:
    trainer = trainer_of(recipe, [VARIED + VARIED, EQUAL + EQUAL], "rollout.reuse=2")
    trainer.step(1)
    before = trainer.older

    def broken(*_) -> None:
        raise MemoryError

    trainer.update.apply = broken
    with pytest.raises(MemoryError), trainer.wholly():
        trainer.step(2)
    assert trainer.older is before


def test_the_state_holds_the_older_groups(recipe) -> None:
    trainer = trainer_of(recipe, [VARIED + VARIED], "rollout.reuse=2")
    assert "older_groups" not in trainer.state().arrays
    trainer.step(1)
    state = trainer.state()
    again = trainer_of(recipe, [], "rollout.reuse=2")
    again.load_state(state)
    assert [one.group() for one in again.older.kept] == [one.group() for one in trainer.older.kept]
    without = trainer_of(recipe, [])
    without.load_state(state)
    assert without.older.kept == ()
    again.load_state(without.state())  # of a checkpoint without any
    assert again.older.kept == ()


def test_entropy_of_older_completions_is_of_the_policy_of_now(make_policy) -> None:
    """What `behaviour` says of them is the entropy of the policy that sampled."""
    policy, cfg = make_policy().policy, sections()
    trajectory = replace(Trajectory.sampled((5, 6), (-50.0, -50.0), "", "stop"), policy_step=0)
    groups = [Group(Task(0, "?", (3, 4), {}), (Rollout(trajectory, {"r": 1.0}),) * 2)]
    assert gauges(policy, cfg).entropy_left_out(groups).total == 200
    older = gauges(policy, cfg).entropy_left_out([lagging(groups[0], 3)])
    assert older.tokens == 4
    assert 0 < older.total < 100
    both = gauges(policy, cfg).entropy_left_out([*groups, lagging(groups[0], 3)])
    assert both.total == pytest.approx(200 + older.total)


def test_the_penalty_that_is_told_is_of_what_the_step_sampled(make_policy) -> None:
    policy, cfg = (
        make_policy().policy,
        sections(advantage={"soft_overlong_cache": 2}, rollout={"max_completion_length": 4}),
    )
    long, short = (Trajectory.sampled((5,) * n, (-1.0,) * n, "", "stop") for n in (4, 1))
    groups = [
        Group(Task(0, "?", (3,), {}), (Rollout(short, {"r": 1.0}), Rollout(long, {"r": 0.0}))),
        Group(Task(1, "?", (3,), {}), (Rollout(long, {"r": 1.0}, lag=1, replayed=True),) * 2),
    ]
    penalised, told = with_penalties(groups, policy, cfg, 0.0)
    assert [[rollout.penalty for rollout in group.rollouts] for group in penalised] == [[0, 1], [1, 1]]
    assert told == {"reward_penalty": 0.5}
    assert with_penalties(groups[1:], policy, cfg, 0.0)[1] == {}


def made(index: int, step: int, behaviour: float = -1.0) -> Group:
    trajectory = replace(Trajectory.sampled((5,), (behaviour,), "", "stop"), policy_step=step - 1)
    return Group(Task(index, "?", (3,), {}), (Rollout(trajectory, {"r": 0.0}), Rollout(trajectory, {"r": 1.0})))


def chosen(older: OlderGroups, missing: int, step: int) -> tuple[list[int], OlderGroups]:
    groups, counted = older.replayed(missing, step)
    assert all(group.lag == step - 1 - group.rollouts[0].trajectory.policy_step for group in groups)
    return [group.task.index for group in groups], counted


def test_the_least_replayed_come_first_and_of_these_the_newest() -> None:
    older = OlderGroups(3).after(1, [made(0, 1), made(1, 1)])
    older = older.after(2, [made(2, 2)])
    first, older = chosen(older, 1, 3)
    second, older = chosen(older, 1, 3)
    rest, older = chosen(older, 9, 3)
    assert (first, second, rest) == ([2], [1], [0, 2, 1])
    assert [one.replays for one in older.kept] == [1, 2, 2]
    assert chosen(older, 0, 3)[0] == []


def test_groups_leave_with_their_age() -> None:
    older = OlderGroups(2).after(1, [made(0, 1)])
    assert [len(older.after(n, []).kept) for n in (2, 3)] == [1, 0]  # at step 3 its lag is 2, at step 4 3
    assert OlderGroups(0).after(1, [made(0, 1)]).kept == ()


def test_a_group_without_a_number_for_every_token_is_not_kept() -> None:
    assert OlderGroups(2).after(1, [made(0, 1, math.nan), made(1, 1)]).kept[0].group().task.index == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": {"type": "rloo"}}, "rollout.reuse: loss.type rloo has no ratio"),
        (
            {"advantage": {"baseline": "gdpo"}},
            "With advantage.baseline: gdpo they teach like all others: leave it out",
        ),
        ({"loss": {"beta": 0.1, "kl_in": "reward"}}, "rollout.reuse: with loss.kl_in: reward, the reward"),
    ],
)
def test_settings_that_would_learn_from_older_groups_as_if_they_were_new(settings: dict, said: str) -> None:
    plain = {
        "model": {"name": "m"},
        "data": {"source": "d", "prompt": "p"},
        "rewards": ({"use": "r"},),
        "optim": {"steps": 1},
    }
    Recipe.model_validate({**plain, **settings})
    with pytest.raises(ValueError, match=said):
        Recipe.model_validate({**plain, **settings, "rollout": {"reuse": 2}})
