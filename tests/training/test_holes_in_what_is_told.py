"""Untrained tokens in the middle of trajectories change nothing of what is measured, stored and replayed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runs.driver import run
from training import sections as parts
from training.holes import (
    GARBAGE,
    LONGEST,
    TOTALS,
    cut,
    everywhere,
    made,
    rows,
    teacher_forced,
)
from training.sections import (
    gauges,
    make_minibatches,
    with_advantages,
    with_penalties,
    with_top_entropy,
)
from training.test_update import recipe as sections

from grpo.config.log import CompletionsConfig
from grpo.objective.groups import with_rewards
from grpo.planning.parity import _forced
from grpo.recipes import load_recipe
from grpo.runs.checkpoint import RECIPE
from grpo.runs.completions import read_completions, store_completions, stored_steps
from grpo.runs.prepare import prepare
from grpo.scoring.scorer import Scorer
from grpo.tools.replay import _made
from grpo.training.gauges import mean_kl, with_all_entropy
from grpo.training.metrics import step_metrics
from grpo.training.update import Update
from grpo.types import SAMPLER, Group, Rollout, Totals


def test_the_quantile_of_entropy_is_of_the_steps_trained_tokens(make_policy) -> None:
    policy, cfg = make_policy().policy, sections(loss={"top_entropy_quantile": 0.3, "type": "dapo"})
    groups = with_advantages(made(policy), cfg)
    (batches,) = with_top_entropy(make_minibatches(groups, cfg), policy, cfg)
    entropies = sorted(
        entropy
        for task, rollout in rows(groups)
        for entropy in rollout.trajectory.of_trained(
            list(teacher_forced(policy, task.prompt_ids, rollout.trajectory.token_ids)[1])
        )
    )
    count = math.ceil(0.3 * TOTALS.tokens)
    assert sum((batch.weights > 0).sum().item() for batch in batches) == count
    for task, rollout in rows(groups):
        ids = rollout.trajectory.token_ids
        (found,) = [w for b in batches for i, w in zip(b.token_ids, b.weights, strict=True) if i[0].item() == ids[0]]
        high = teacher_forced(policy, task.prompt_ids, ids)[1] > entropies[-count] - 1e-6
        expected = high * np.array(rollout.trajectory.trained) / count
        np.testing.assert_allclose(found[: len(ids)], expected, atol=1e-6)


def test_lengths_and_rates_are_of_trained_tokens(make_policy) -> None:
    groups = cut(made(make_policy().policy))
    values = step_metrics(1, groups, Update(0.0, 0.0, {}), {}, {"rollout": 2.0}).values
    assert values["num_tokens"] == 17
    assert values["rollout_tokens_per_second"] == 8.5
    lengths = {name.removeprefix("completions/"): value for name, value in values.items() if "_length" in name}
    assert lengths == {
        "mean_length": pytest.approx(17 / 6), "min_length": 2, "max_length": 4,
        "mean_terminated_length": 11 / 4, "min_terminated_length": 2, "max_terminated_length": 3,
    }  # fmt: skip


@pytest.mark.parametrize("filler", [0.0, *GARBAGE])
@pytest.mark.parametrize("filtered", [False, True])
def test_entropy_is_of_trained_tokens(make_policy, filler: float, filtered: bool) -> None:
    """Of those that the update sees and of the rest, which `behaviour` tells, or with filters a forward pass."""
    policy, cfg = make_policy().policy, sections(loss={"mask_truncated_completions": True})
    groups = with_advantages(cut(made(policy, filler, noise=0.0)), cfg)
    groups = everywhere(groups, SAMPLER, filler) if filtered else groups
    rest = gauges(policy, cfg).entropy_left_out(groups)
    left = [(group.task, group.rollouts[0]) for group in groups]
    forced = [teacher_forced(policy, task.prompt_ids, r.trajectory.token_ids) for task, r in left]
    chosen = [
        sum(r.trajectory.of_trained(list(entropies if filtered else -logprobs)))
        for (_, r), (logprobs, entropies) in zip(left, forced, strict=True)
    ]
    assert rest.tokens == 4 + 2
    assert rest.total == pytest.approx(sum(chosen), rel=1e-5)
    whole = with_all_entropy(Update(0.0, 0.0, {"entropy": 2.0}), rest, TOTALS)
    assert whole.metrics["entropy"] == pytest.approx((11 * 2.0 + rest.total) / 17)


@pytest.mark.parametrize("filler", GARBAGE)
def test_penalties_are_of_trained_tokens(make_policy, filler: float) -> None:
    """The KL in the reward, a row of which nothing was sampled among them, and the soft overlong punishment."""
    policy, base = make_policy().policy, make_policy(trained=False).policy
    cfg = sections(loss={"beta": 0.5, "kl_in": "reward"}, advantage={"soft_overlong_cache": 6})
    groups = made(policy, filler)
    silent = groups[0].rollouts[0]
    silent = replace(silent, trajectory=replace(silent.trajectory, trained=(False,) * 6))
    groups = [replace(groups[0], rollouts=(silent, *groups[0].rollouts[1:])), groups[1]]
    totals = Totals.of(groups)
    assert totals == Totals(6, 13)
    kls, overlong = [], []
    for task, rollout in rows(groups):
        t = rollout.trajectory
        d = teacher_forced(base, task.prompt_ids, t.token_ids)[0] - np.array(t.behaviour)
        kls.append(sum(math.exp(x) - x - 1 for x in t.of_trained(list(d))))
        overlong.append(max(0, t.trained_tokens - (LONGEST - 6)) / 6)
    assert gauges(policy, cfg).divergences(groups) == pytest.approx(kls, abs=1e-4)
    penalised, told = with_penalties(with_rewards(groups, parts.weights(groups, cfg)), policy, cfg, 0.5)
    expected = [0.5 * kl + more for kl, more in zip(kls, overlong, strict=True)]
    assert [rollout.penalty for _, rollout in rows(penalised)] == pytest.approx(expected, abs=1e-4)
    assert told["kl"] == pytest.approx(sum(kls) / 13, abs=1e-5) == pytest.approx(mean_kl(kls, totals), abs=1e-5)


def test_what_is_teacher_forced_is_told_of_trained_tokens_alone(make_policy) -> None:
    policy = make_policy().policy
    groups = made(policy)
    expected = [
        x
        for task, r in rows(groups)
        for x in r.trajectory.of_trained(list(teacher_forced(policy, task.prompt_ids, r.trajectory.token_ids)[0]))
    ]
    assert _forced(policy, groups, None) == pytest.approx(expected, abs=1e-5)


def test_what_is_stored_comes_back_with_its_holes(make_policy, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    groups = cut(made(make_policy().policy, noise=0.0))
    path = store_completions(tmp_path, 1, groups, CompletionsConfig(), 0, 2)
    for stored, was in zip(rows(read_completions(path)[1]), rows(groups), strict=True):
        assert stored[1].trajectory.trained == was[1].trajectory.trained
        assert stored[1].trajectory.token_ids == was[1].trajectory.token_ids
        assert stored[1].trajectory.behaviour == pytest.approx(was[1].trajectory.behaviour, rel=1e-6)
    old = pq.read_table(path).drop_columns(["trained", "policy_step"])
    pq.write_table(old, path)
    (_, rollout), *_ = rows(read_completions(path)[1])
    assert rollout.trajectory.trained == (True,) * 6
    assert rollout.trajectory.policy_step is None


def holed(groups: list[Group], filler: float) -> list[Group]:
    """Rolled-out groups as if the second and third token of each row were a tool's."""

    def changed(rollout: Rollout) -> Rollout:
        t = rollout.trajectory
        trained = tuple(i not in (1, 2) for i in range(len(t.token_ids)))
        columns = {
            name: tuple(x if kept else filler for x, kept in zip(values, trained, strict=True))
            for name, values in t.columns.items()
        }
        return replace(rollout, trajectory=replace(t, trained=trained, columns=columns))

    return [replace(group, rollouts=tuple(map(changed, group.rollouts))) for group in groups]


SETTINGS = [
    ["loss.beta=0.1", "loss.top_entropy_quantile=0.5", "optim.num_minibatches=2", "optim.num_iterations=2"],
    ["loss.type=gspo", "rollout.top_k=5", "loss.importance_sampling_correction=token_truncate", "log.kl=1"],
    ["loss.kl_in=reward", "loss.beta=0.1", "advantage.soft_overlong_cache=4", "rollout.dynamic_sampling=1"],
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_whole_step_is_the_same_whatever_untrained_tokens_hold(recipe, settings: list[str]) -> None:
    """Every metric that no clock decides; the gap between sampler and trainer is still held to its bound."""
    found = []
    for filler in (0.0, *GARBAGE):
        trainer = prepare(load_recipe(recipe, settings)).trainer
        rollout = trainer.engine.rollout

        def in_holes(*args, filler=filler, rollout=rollout, **_):
            return holed(rollout(*args), filler)

        trainer.engine.rollout = in_holes
        trainer.scorer = Scorer({"digits": lambda completions, **_: [i % 3 / 2 for i in range(len(completions))]})
        metrics = trainer.step(1)
        trainer.scorer.close()
        tokens = sum(r.trajectory.trained_tokens for group in metrics.groups for r in group.rollouts)
        assert metrics.values["num_tokens"] == tokens
        assert tokens < sum(len(r.trajectory.token_ids) for group in metrics.groups for r in group.rollouts)
        values = metrics.values.items()
        found.append({k: v for k, v in values if not k.startswith(("time/", "step_time", "rollout_tok", "peak"))})
    assert found[0]["grad_norm"] > 0
    assert found[0] == found[1] == found[2]


def test_a_run_stores_which_policy_sampled(recipe) -> None:
    run(recipe)
    steps = [
        {r.trajectory.policy_step for group in read_completions(path)[1] for r in group.rollouts}
        for path in stored_steps(Path("runs/toy/completions"))
    ]
    assert steps == [{0}, {1}]


def test_a_replay_tells_ratios_of_trained_tokens(recipe, tmp_path: Path) -> None:
    trainer = prepare(load_recipe(recipe)).trainer
    rollout = trainer.engine.rollout
    trainer.engine.rollout = lambda *args, **_: holed(rollout(*args), math.nan)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / RECIPE).write_text(recipe.read_text())
    replay = _made(trainer, tmp_path / "made", 1, None)
    trainer.scorer.close()
    for (_, r), ratios, tokens in zip(rows(list(replay.metrics.groups)), replay.ratios, replay.tokens, strict=True):
        ids = r.trajectory.token_ids
        assert len(ratios) == len(tokens) == r.trajectory.trained_tokens == len(ids) - min(2, len(ids) - 1)
        assert tokens == [trainer.engine.generator.tokenizer.decode([i]) for i in (ids[0], *ids[3:])]
        assert all(math.isfinite(ratio) for ratio in ratios)
