"""Trajectories with untrained tokens in the middle: the model sees them; nothing counts them or learns from them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from objective.oracle import PAPER, weights
from runs.driver import run
from training import sections as parts
from training.sections import (
    gauges,
    make_batches,
    make_minibatches,
    updater,
    with_advantages,
    with_penalties,
    with_reference,
    with_top_entropy,
)
from training.test_update import difference
from training.test_update import recipe as sections

from grpo.config.log import CompletionsConfig
from grpo.model.policy import Policy
from grpo.objective.groups import with_rewards
from grpo.planning.parity import _forced
from grpo.presets import PRESETS
from grpo.recipes import load_recipe
from grpo.runs.checkpoint import RECIPE
from grpo.runs.completions import read_completions, store_completions, stored_steps
from grpo.runs.prepare import prepare
from grpo.scoring.scorer import Scorer
from grpo.tools.replay import _made
from grpo.training.gauges import mean_kl, with_all_entropy
from grpo.training.metrics import step_metrics
from grpo.training.update import Update
from grpo.types import BEHAVIOUR, SAMPLER, Group, Rollout, Task, Totals, Trajectory

MASKS = [  # of the completions of two prompts: s sampled and trained, t a tool's
    ["ssttss", "tsts", "sss"],
    ["sstttttt", "tstss", "stss"],
]
REWARDS = [[1.0, 0.0, 0.2], [0.0, 1.0, 3.0]]
LONGEST = 8
GARBAGE = [math.nan, 1e9]


def teacher_forced(policy: Policy, prompt: tuple[int, ...], ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Logprobs and entropies of a row's tokens by the model's own forward pass."""
    logits = policy.model(mx.array([[*prompt, *ids]]))[0, len(prompt) - 1 : -1].astype(mx.float32)
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), dtype=np.float64)
    return logprobs[range(len(ids)), list(ids)], -(np.exp(logprobs) * logprobs).sum(axis=1)


def made(policy: Policy, filler: float = 7.0, noise: float = 0.1) -> list[Group]:
    """Two groups of three whose `behaviour` is `noise` off the policy's, and `filler` on untrained tokens."""
    draw, groups = np.random.default_rng(0), []
    for g, (masks, rewards) in enumerate(zip(MASKS, REWARDS, strict=True)):
        prompt = tuple(range(10 * g + 5, 10 * g + 8 + g))
        rollouts = []
        for i, (mask, reward) in enumerate(zip(masks, rewards, strict=True)):
            ids = tuple(100 + 7 * g + 3 * i + t for t in range(len(mask)))
            off = teacher_forced(policy, prompt, ids)[0] + draw.normal(0, noise, len(ids))
            trained = tuple(kind == "s" for kind in mask)
            behaviour = tuple(float(x) if kept else filler for x, kept in zip(off, trained, strict=True))
            trajectory = Trajectory(ids, trained, {BEHAVIOUR: behaviour}, "", "stop")
            rollouts.append(Rollout(trajectory, {"r": reward}, reward=reward))
        groups.append(Group(Task(g, "?", prompt, {}), tuple(rollouts)))
    return groups


def rows(groups: list[Group]) -> list[tuple[Task, Rollout]]:
    return [(group.task, rollout) for group in groups for rollout in group.rollouts]


TRAINED = [[mask.count("s") for mask in masks] for masks in MASKS]
TOTALS = Totals(6, 4 + 2 + 3 + 2 + 3 + 3)


def cut(groups: list[Group]) -> list[Group]:
    """The same with the first completion of each group cut off at its limit."""
    first = [
        replace(g.rollouts[0], trajectory=replace(g.rollouts[0].trajectory, finish_reason="length")) for g in groups
    ]
    return [replace(g, rollouts=(one, *g.rollouts[1:])) for g, one in zip(groups, first, strict=True)]


def everywhere(groups: list[Group], column: str, filler: float) -> list[Group]:
    """The same with a column that holds `filler` on untrained tokens, and what `behaviour` holds on others."""

    def filled(rollout: Rollout) -> Rollout:
        t = rollout.trajectory
        values = tuple(x if kept else filler for x, kept in zip(t.columns[BEHAVIOUR], t.trained, strict=True))
        return replace(rollout, trajectory=replace(t, columns={**t.columns, column: values}))

    return [replace(group, rollouts=tuple(map(filled, group.rollouts))) for group in groups]


def test_a_column_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="trained has 1 values for 2 tokens"):
        Trajectory((1, 2), (True,), {}, "", "stop")
    with pytest.raises(ValueError, match="behaviour has 3 values for 2 tokens"):
        Trajectory.sampled((1, 2), (0.0,) * 3, "", "stop")


def test_what_a_trajectory_counts() -> None:
    trajectory = Trajectory((1, 2, 3), (True, False, True), {BEHAVIOUR: (-1.0, math.nan, -2.0)}, "", "stop")
    assert trajectory.trained_tokens == 2
    assert trajectory.of_trained(trajectory.behaviour) == [-1.0, -2.0]
    assert trajectory.sampler is None
    assert Trajectory.sampled((1, 2), None, "", "stop").trained == (True, True)


@pytest.mark.parametrize("kind", PRESETS)
def test_masks_and_weights_of_batches(make_policy, kind: str) -> None:
    """Each row's mask is `trained`, wherever it stands; its weights are the oracle's of the whole step."""
    policy, cfg = make_policy().policy, sections(loss={"type": kind, "entropy_coef": 0.1})
    local = cfg.loss.preset.normalize == "micro_batch"
    cfg = sections(loss={"type": kind, "entropy_coef": 0.1}, optim={"micro_batch_tokens": 999 if local else 20})
    groups = with_advantages(made(policy), cfg)
    assert Totals.of(groups) == TOTALS
    mask = np.zeros((6, LONGEST))
    for i, text in enumerate(text for masks in MASKS for text in masks):
        mask[i, : len(text)] = [kind == "s" for kind in text]
    expected = {
        rollout.trajectory.token_ids: (mask[i], weight, rollout.advantage)
        for i, ((_, rollout), weight) in enumerate(
            zip(rows(groups), weights(mask, PAPER[kind][2], LONGEST), strict=True)
        )
    }
    batches = make_batches(groups, cfg)
    assert len(batches) == 1 if local else len(batches) > 2
    for batch in batches:
        for ids, *columns in zip(batch.token_ids, batch.trained, batch.weights, batch.advantages, strict=True):
            own = next(key for key in expected if list(key) == ids[: len(key)].tolist())
            row, weight, advantage = expected.pop(own)
            for found, wanted in zip(columns, (row, weight, row * advantage), strict=True):
                np.testing.assert_allclose(found, wanted[: len(found)], atol=1e-6)
                assert not wanted[len(found) :].any()
    assert not expected


def test_shapes_hold_what_is_not_trained_too(make_policy) -> None:
    """It goes through the model: lengths of micro-batches are those of all tokens."""
    policy, cfg = make_policy().policy, sections(optim={"micro_batch_tokens": 999})
    (batch,) = make_batches(with_advantages(made(policy), cfg), cfg)
    assert batch.token_ids.shape == (6, 8)


def test_the_gradient_is_that_of_the_trained_tokens(make_policy) -> None:
    """On policy that of -Σ A log p over trained tokens, divided by their number, each after all tokens before it."""
    policy, cfg = make_policy().policy, sections(advantage={"scale_rewards": "none"})
    groups = with_advantages(made(policy, noise=0.0), cfg)
    found = updater(policy, cfg).gradient(make_batches(groups, cfg))

    def loss(parameters: dict) -> mx.array:
        policy.model.update(parameters)
        total = mx.array(0.0)
        for task, rollout in rows(groups):
            ids, prompt = rollout.trajectory.token_ids, task.prompt_ids
            logits = policy.model(mx.array([[*prompt, *ids]]))[0, len(prompt) - 1 : -1].astype(mx.float32)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            for t, (token, trained) in enumerate(zip(ids, rollout.trajectory.trained, strict=True)):
                total = total - rollout.advantage * logprobs[t, token] if trained else total
        return total / TOTALS.tokens

    parameters = policy.model.trainable_parameters()
    _, expected = mx.value_and_grad(loss)(parameters)
    policy.model.update(parameters)
    assert difference(found.arrays, dict(tree_flatten(expected))) < 1e-5
    assert found.metrics["tokens"] == TOTALS.tokens


@pytest.mark.parametrize("kind", PRESETS)
def test_what_untrained_tokens_hold_changes_nothing(make_policy, kind: str) -> None:
    """No bit of the gradient, and no metric, of two passes under a penalty, whatever the columns hold there."""
    policy = make_policy().policy
    cfg = sections(loss={"type": kind, "beta": 0.1})

    def measured(filler: float):
        groups = everywhere(with_advantages(made(policy, filler), cfg), SAMPLER, filler)
        minibatches = [with_reference(b, policy, cfg) for b in make_minibatches(groups, cfg)]
        other = [
            [replace(b, anchor=b.behaviour, reference=mx.where(b.trained > 0, b.reference, filler)) for b in batches]
            for batches in minibatches
        ]
        return [updater(policy, cfg).gradient(batches) for batches in other]

    clean = measured(0.0)
    assert sum(gradient.metrics["tokens"] for gradient in clean) == TOTALS.tokens
    for filler in GARBAGE:
        for found, expected in zip(measured(filler), clean, strict=True):
            assert (found.loss, found.metrics) == (expected.loss, expected.metrics)
            assert all(mx.array_equal(array, expected.arrays[path]) for path, array in found.arrays.items())


@pytest.mark.parametrize("tokens", [20, 999])
def test_rows_with_and_without_filters_are_corrected_alike_however_they_are_packed(make_policy, tokens: int) -> None:
    """Without filters the distribution that was drawn from is the policy's: `sampler` is `behaviour` there."""
    policy = make_policy().policy
    cfg = sections(
        loss={"type": "dapo", "importance_sampling_correction": "token_truncate"}, optim={"micro_batch_tokens": tokens}
    )
    plain, other = with_advantages(made(policy, noise=0.5), cfg)
    filtered = [
        replace(
            r,
            trajectory=replace(
                r.trajectory, columns={**r.trajectory.columns, SAMPLER: (-0.1,) * len(r.trajectory.token_ids)}
            ),
        )
        for r in other.rollouts
    ]
    groups = [plain, replace(other, rollouts=tuple(filtered))]
    told = everywhere([plain], SAMPLER, 0.0)
    found, expected = (
        updater(policy, cfg).gradient([batch for batches in make_minibatches(mixed, cfg) for batch in batches])
        for mixed in (groups, [*told, groups[1]])
    )
    assert found.metrics == expected.metrics
    assert difference(found.arrays, expected.arrays) == 0
    correction = sections(
        loss={"type": "dapo", "importance_sampling_correction": "none"}, optim={"micro_batch_tokens": tokens}
    )
    bare = updater(policy, correction).gradient([b for bs in make_minibatches(groups, correction) for b in bs])
    assert difference(bare.arrays, expected.arrays) > 1e-3


def test_overlong_filtering_takes_out_trained_tokens(make_policy) -> None:
    policy, cfg = make_policy().policy, sections(loss={"type": "dapo", "mask_truncated_completions": True})
    batches = make_batches(with_advantages(cut(made(policy)), cfg), cfg)
    left = TOTALS.tokens - 4 - 2
    assert sum(batch.trained.sum().item() for batch in batches) == left
    for batch in batches:
        np.testing.assert_allclose(batch.weights, np.array(batch.trained) / left, atol=1e-7)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "luspo"])
def test_rows_that_are_left_out_stay_in_the_denominators(make_policy, kind: str) -> None:
    """Those of advantage 0, those that are filtered, and one of which nothing was sampled: 6 were."""
    policy, cfg = make_policy().policy, sections(loss={"type": kind, "mask_truncated_completions": True})
    groups = with_advantages(cut(made(policy)), cfg)
    kept, silent, *_ = groups[1].rollouts[1:]
    nothing = replace(silent, trajectory=replace(silent.trajectory, trained=(False,) * 4))
    batches = make_batches([groups[0], replace(groups[1], rollouts=(groups[1].rollouts[0], kept, nothing))], cfg)
    (row,) = [w for b in batches for ids, w in zip(b.token_ids, b.weights, strict=True) if ids[0].item() == 110]
    each = {"grpo": 1 / (6 * 3), "dr_grpo": 1 / (6 * LONGEST), "luspo": 1 / 6}[kind]  # "tstss"
    assert row[:5].tolist() == pytest.approx([0, each, 0, each, each])
    assert sum((batch.trained.sum(axis=1) > 0).sum().item() for batch in batches) == 3


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
    replay = _made(trainer, tmp_path / "made", 1)
    trainer.scorer.close()
    for (_, r), ratios, tokens in zip(rows(list(replay.metrics.groups)), replay.ratios, replay.tokens, strict=True):
        ids = r.trajectory.token_ids
        assert len(ratios) == len(tokens) == r.trajectory.trained_tokens == len(ids) - min(2, len(ids) - 1)
        assert tokens == [trainer.engine.generator.tokenizer.decode([i]) for i in (ids[0], *ids[3:])]
        assert all(math.isfinite(ratio) for ratio in ratios)
