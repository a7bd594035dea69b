"""`rollout.reuse` beside other settings: what a replayed group is learnt from with, and what each update gets of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import pytest
from training.sections import make_minibatches, with_advantages
from training.test_older_groups import EQUAL, VARIED, lags, trainer_of
from training.test_update import groups
from training.test_update import recipe as sections

from grpo.model.adapters import REFERENCE
from grpo.presets import PRESETS
from grpo.rollout import with_policy_step
from grpo.training.batches import forced
from grpo.training.older import lagging
from grpo.training.trainer import Trainer
from grpo.types import Batch

FAST = "optim.learning_rate=0.02"
"""A rate at which a step moves the policy far."""


def each_batch(trainer: Trainer, seen: Callable[[Batch], None]) -> None:
    """Call `seen` with every batch of an update, before its gradient."""
    gradient = trainer.update.gradient

    def noted(batches, key=None):
        for batch in batches:
            seen(batch)
        return gradient(batches, key)

    trainer.update.gradient = noted


def stale_rows(batch: Batch) -> mx.array:
    return mx.zeros(batch.trained.shape) if batch.stale is None else batch.stale


def gap(batch: Batch, column: mx.array, other: mx.array, of: mx.array) -> float:
    """The largest difference of two columns at the tokens of a mask."""
    return (mx.abs(column - other) * of).max().item()


@pytest.mark.quick_cases("grpo", "gspo", "cispo", "sapo", "vespo", "gmpo", "dppo")
@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].surrogate != "reinforce"])
def test_a_step_of_older_groups_alone_is_clipped_by_how_far_the_policy_has_moved(recipe, name: str) -> None:
    """Though it has one update, and so its own completions would have ratios of 1. (dppo's bounds are on probabilities,
    which are small here.)"""
    bounds = ["loss.epsilon=0.001", "loss.epsilon_high=0.001"] if name == "dppo" else []
    trainer = trainer_of(recipe, [VARIED * 2, EQUAL * 2], "rollout.reuse=1", FAST, f"loss.type={name}", *bounds)
    first = trainer.step(1)
    far: list[float] = []
    each_batch(
        trainer, lambda batch: far.append(gap(batch, forced(trainer.policy, batch), batch.behaviour, batch.stale))
    )
    second = trainer.step(2)
    assert lags(second) == [1, 1, 0, 0]
    assert max(far) > 0.05
    if "clip_ratio/region_mean" in first.values:
        assert first.values["clip_ratio/region_mean"] == 0
        assert second.values["clip_ratio/region_mean"] > 0
    assert second.values["grad_norm"] > 0 or second.values["clip_ratio/region_mean"] == 1


def test_every_update_has_its_share_of_older_groups(recipe) -> None:
    calls = [VARIED * 4, VARIED * 2 + EQUAL * 2]
    settings = ["rollout.reuse=1", "rollout.prompts_per_step=4", "optim.num_minibatches=2"]
    trainer = trainer_of(recipe, calls, *settings)
    trainer.step(1)
    shares: list[float] = []
    trainer.update.apply = lambda gradient, step, apply=trainer.update.apply: (
        shares.append(gradient.metrics["fresh_tokens"] / gradient.metrics["tokens"]) or apply(gradient, step)
    )
    assert lags(trainer.step(2))[:4] == [0, 0, 1, 1]
    assert len(shares) == 2
    assert all(0.2 < share < 0.8 for share in shares)


def test_the_reference_of_an_older_group_is_todays(recipe) -> None:
    settings = ["rollout.reuse=1", "loss.beta=0.1", "adapter.sync_reference_every=1", FAST]
    settings += ["adapter.ref_model_mixup_alpha=1"]
    trainer = trainer_of(recipe, [VARIED * 2, EQUAL * 2], *settings)
    trainer.step(1)  # at its end the reference moves to where the policy is
    gaps: list[tuple[float, float]] = []

    def seen(batch: Batch) -> None:
        with trainer.policy.use(REFERENCE):
            now = forced(trainer.policy, batch)
        gaps.append(tuple(gap(batch, batch.reference, other, batch.stale) for other in (now, batch.behaviour)))

    each_batch(trainer, seen)
    metrics = trainer.step(2)
    assert max(now for now, _ in gaps) == 0
    assert max(then for _, then in gaps) > 0.05
    assert metrics.values["kl"] == pytest.approx(0, abs=1e-6)  # to where the policy begins this step


@pytest.mark.parametrize(
    "settings",
    [
        ["advantage.soft_overlong_cache=7"],
        ["loss.type=dr_grpo", "advantage.soft_overlong_cache=7"],
        ["advantage.baseline=leave_one_out"],
        ["advantage.baseline=maxrl"],
    ],
    ids=" ".join,
)
def test_a_replayed_group_has_the_reward_the_penalty_and_the_advantages_that_it_had(recipe, settings) -> None:
    """Rewards are kept without penalties, which are taken off again."""
    trainer = trainer_of(recipe, [VARIED * 2, EQUAL * 2, EQUAL * 2], "rollout.reuse=2", *settings)
    first, second, third = (trainer.step(n) for n in (1, 2, 3))
    known = {key(row): value(row) for group in first.groups for row in group.rollouts}
    assert any(penalty for _, penalty, _ in known.values()) == ("overlong" in "".join(settings))
    for step in (second, third):
        replayed = [row for group in step.groups if group.lag for row in group.rollouts]
        assert len(replayed) == 8
        assert [value(row) for row in replayed] == [pytest.approx(known[key(row)]) for row in replayed]
    assert "reward_penalty" not in second.values or second.values["reward"] == 1  # of what the step sampled


def key(row) -> tuple:
    return row.trajectory.token_ids, row.scores["digits"]


def value(row) -> tuple[float, float, float]:
    return row.reward, row.penalty, row.advantage


def test_truncated_completions_stay_out_when_they_come_again(recipe) -> None:
    """All of the toy's are cut off: their group has different rewards, and teaches nothing, now as then."""
    settings = ["rollout.reuse=1", "loss.mask_truncated_completions=true", "rollout.max_completion_length=2"]
    trainer = trainer_of(recipe, [VARIED * 2, EQUAL * 2], *settings)
    first, second = trainer.step(1), trainer.step(2)
    assert first.values["completions/clipped_ratio"] == 1
    assert lags(second) == [1, 1, 0, 0]
    assert second.values["steps_without_signal"] == 2


def test_a_run_begins_with_nothing_to_replay(recipe) -> None:
    """And may look back further than it is long."""
    trainer = trainer_of(recipe, [EQUAL * 2, VARIED + EQUAL, EQUAL * 2], "rollout.reuse=1000")
    steps = [trainer.step(n) for n in (1, 2, 3)]
    assert [lags(step) for step in steps] == [[0, 0], [0, 0], [0, 1, 0]]
    assert [step.values["reuse/groups"] for step in steps] == [0, 0, 1]
    assert steps[2].values["steps_without_signal"] == 1  # the first
    assert all(math.isfinite(step.values["policy_lag/mean"]) for step in steps)


@pytest.mark.parametrize(
    "settings",
    [
        ["rollout.top_p=0.5", "loss.importance_sampling_correction=token_truncate"],
        ["rollout.min_p=0.3", "loss.type=dppo"],
        ["adapter.dropout=0.5", "optim.num_iterations=2"],
    ],
    ids=" ".join,
)
def test_an_older_group_has_the_logprobs_of_its_sampler_in_every_update(recipe, settings: list[str]) -> None:
    """Before filters and after them: whatever this step measures of the policy, with dropout or without."""
    trainer = trainer_of(recipe, [VARIED * 2, VARIED + EQUAL], "rollout.reuse=1", FAST, *settings)
    first = trainer.step(1)
    known = {(g.task.prompt_ids, r.trajectory.token_ids): r.trajectory for g in first.groups for r in g.rollouts}
    compared: list[bool] = []

    def seen(batch: Batch) -> None:
        of_row = [batch.prompt_ids[place].tolist() for place in batch.prompt_index.tolist()]
        lengths = [batch.prompt_lengths[place].item() for place in batch.prompt_index.tolist()]
        for row, stale in enumerate(stale_rows(batch).tolist()):
            if n := int(sum(stale)):
                sampled = known[tuple(of_row[row][: lengths[row]]), tuple(batch.token_ids[row, :n].tolist())]
                compared.append(batch.behaviour[row, :n].tolist() == list(sampled.behaviour))
                if sampled.sampler is not None:
                    compared.append(batch.sampler[row, :n].tolist() == list(sampled.sampler))

    each_batch(trainer, seen)
    assert lags(trainer.step(2))[:2] == [0, 1]
    assert len(compared) == 4 * 2  # two columns, or two updates
    assert all(compared)


@pytest.mark.parametrize("name", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_older_rows_count_in_every_denominator(make_policy, name: str) -> None:
    """As fresh ones do, so a step's weights do not depend on how many of its groups were replayed."""
    policy, cfg = make_policy().policy, sections(loss={"type": name}, optim={"micro_batch_tokens": 32})
    fresh = with_advantages(groups(policy), cfg)
    older = [lagging(with_policy_step([group], 0)[0], 1 + place) for place, group in enumerate(fresh)]
    made = [make_minibatches(some, cfg)[0] for some in (fresh, older)]
    for one, other in zip(*made, strict=True):
        assert mx.array_equal(one.weights, other.weights)
    assert sum(stale_rows(batch).sum().item() for batch in made[1]) > 0
