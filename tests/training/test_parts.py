"""The smaller parts of training: schedule, checkpoints, evaluation, metrics, signals, parity, the plan."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import mlx.core as mx
import pytest

from grpo.config import OptimConfig
from grpo.errors import RunError
from grpo.generation.slots import View
from grpo.planning.parity import check_parity
from grpo.planning.planner import decode_as_planned
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare
from grpo.scoring.scorer import Scorer
from grpo.training.metrics import step_metrics
from grpo.training.schedule import learning_rate, penalty_weight
from grpo.training.update import Update
from grpo.types import Conversation, Failure, Group, Rollout, Task, Trajectory


def rates(kind: str, warmup: int = 0) -> list[float]:
    cfg = OptimConfig(steps=4 + warmup, learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=warmup)
    return [learning_rate(cfg, step) for step in range(1, cfg.steps + 1)]


def test_schedules_by_hand() -> None:
    assert rates("constant", 2) == [0.5, 1, 1, 1, 1, 1]
    assert rates("linear", 2) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates("cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_decay_is_that_of_transformers(warmup: int) -> None:
    """`get_linear_schedule_with_warmup` and `get_cosine_schedule_with_warmup` at the steps after the warm-up."""
    steps = 4 + warmup
    fractions = [(k - warmup) / (steps - warmup) for k in range(warmup, steps)]  # they count from 0
    assert rates("linear", warmup)[warmup:] == pytest.approx([1 - x for x in fractions])
    assert rates("cosine", warmup)[warmup:] == pytest.approx([(1 + math.cos(math.pi * x)) / 2 for x in fractions])
    assert rates("linear", warmup)[-1] == pytest.approx(1 / (steps - warmup))  # as the schema says
    assert rates("linear", 3)[0] == pytest.approx(1 / 3)


def test_step_metrics_by_hand() -> None:
    def rollout(length: int, reward: float | None, reason: str = "stop") -> Rollout:
        return Rollout(Trajectory.sampled((1,) * length, None, "", reason), {"r": reward}, reward=reward)

    groups = [
        Group(Task(0, "?", (1,), {}), (rollout(2, 1.0), rollout(4, 0.0))),
        Group(Task(1, "?", (1,), {}), (rollout(6, 0.5, "length"), rollout(8, None, "repetition"))),
    ]
    update = Update(-0.1, 2.0, {"tokens": 10.0, "entropy": 0.5, "clip_ratio/low_mean": 0.1})
    seconds = {"rollout": 2.0, "update": 1.0}
    values = step_metrics(3, groups, update, {"learning_rate": 1e-3}, seconds).values
    assert values["reward"] == 0.5
    assert values["reward_std"] == pytest.approx(0.5**0.5 / 2)
    assert values["frac_reward_zero_std"] == 0.5
    assert values["rewards/r/mean"] == 0.5
    assert values["rewards/r/none_rate"] == 0.25
    assert [values[f"completions/{name}_length"] for name in ("mean", "min", "max")] == [5, 2, 8]
    assert [values[f"completions/{name}_terminated_length"] for name in ("mean", "min", "max")] == [3, 2, 4]
    assert (values["completions/clipped_ratio"], values["completions/repetition_ratio"]) == (0.25, 0.25)
    assert [values[name] for name in ("solved_all", "solved_none", "mixed")] == [0, 0.5, 0.5]
    assert "tokens" not in values
    assert (values["entropy"], values["clip_ratio/low_mean"]) == (0.5, 0.1)
    assert (values["loss"], values["grad_norm"], values["learning_rate"]) == (-0.1, 2.0, 1e-3)
    assert (values["num_tokens"], values["rollout_tokens_per_second"], values["step_time"]) == (20, 10, 3)


def test_of_tools_that_give_no_rewards_nothing_is_told_unless_they_fail() -> None:
    def told(failures: Mapping[str, Failure], score: float | None = None) -> set[str]:
        talk = Conversation("tools", (), ())
        trajectory = replace(Trajectory.sampled((1,), None, "", "stop"), conversation=talk)
        rollout = Rollout(trajectory, {"r": None, "tools": score}, failures, reward=1.0)
        values = step_metrics(
            1, [Group(Task(0, "?", (1,), {}), (rollout,))], Update(0.0, 0.0, {}), {}, {"rollout": 1.0}
        ).values
        assert values["rewards/r/none_rate"] == 1
        return {name for name in values if name.startswith("rewards/tools/")}

    assert told({}) == set()
    assert "rewards/tools/crash_rate" in told({"tools": Failure("crash", "gone")})
    assert "rewards/tools/mean" in told({}, 0.0)


@pytest.mark.parametrize("n", [3, 7, 49])
def test_the_rate_of_no_score_is_exact(n: int) -> None:
    rollouts = [
        Rollout(Trajectory.sampled((1,), None, "", "stop"), {"r": None if i == 0 else 1.0}, reward=1.0)
        for i in range(n)
    ]
    groups = [Group(Task(0, "?", (1,), {}), tuple(rollouts))]
    values = step_metrics(1, groups, Update(0.0, 0.0, {}), {}, {"rollout": 1.0}).values
    assert values["rewards/r/none_rate"] == 1 / n


def test_parity_is_measured_and_a_gap_stops_the_run(recipe, monkeypatch) -> None:
    run = prepare(load_recipe(recipe))
    policy, engine = run.trainer.policy, run.trainer.engine
    assert "mean gap" in check_parity(policy, engine, run.tasks, 0)
    # A model whose cache is handled wrongly: every token is decoded at the position of the one before it.
    monkeypatch.setattr(View, "positions", property(lambda self: self.lengths[self.place_of] + self.decoded - 1))
    with pytest.raises(RunError, match="training on it would not be sound"):
        check_parity(policy, engine, run.tasks, 0)


def test_a_generator_takes_what_its_plan_has_for_it(recipe) -> None:
    run = prepare(load_recipe(recipe))
    generator = run.trainer.engine.generator
    decode_as_planned(generator, replace(run.plan, slots=3, kept_bytes=1_000, fed=2))
    assert (generator.slots, generator.kept_bytes, generator.speculation.most) == (3, 1_000, 2)


def test_the_plan_counts_what_there_is(recipe) -> None:
    run = prepare(load_recipe(recipe, ["rollout.speculate=off"]))
    plan = run.plan
    assert (plan.steps, plan.prompts, plan.rows) == (2, 2, 8)
    longest = max(len(task.prompt_ids) for task in run.tasks)
    assert plan.tokens == 8 * (longest + 8)
    state = run.trainer.policy.adapters.state()
    assert plan.trained == sum(array.size for array in state.values())
    keys_and_values = 2 * 2 * 16 * 2 * 4  # two heads of 16, of each, in each of two layers, four bytes each
    assert plan.phases["rollout"] > 8 * 8 * keys_and_values + 2 * longest * keys_and_values
    assert plan.slots == run.trainer.engine.generator.slots == 8
    drafting = prepare(load_recipe(recipe))
    assert drafting.trainer.engine.generator.speculation.most == drafting.plan.fed == 8
    assert plan.drafts == 0 < drafting.plan.drafts
    for one in (run, drafting):  # wide steps have room, whether they are asked for or not
        beside = sum(one.plan.stays.values()) + one.plan.phases["rollout"] + drafting.plan.drafts
        kept = one.trainer.engine.generator.kept_bytes
        assert one.plan.kept_bytes == kept == int(0.9 * one.plan.memory) - beside > 0


def test_each_step_samples_anew(recipe) -> None:
    trainer = prepare(load_recipe(recipe)).trainer
    seen = []
    trainer.tasks.take = lambda n: run_tasks[:n]
    run_tasks = prepare(load_recipe(recipe)).tasks
    rollout = trainer.engine.rollout
    trainer.engine.rollout = lambda *args, **named: seen.append(rollout(*args, **named)) or seen[-1]
    trainer.step(1)
    trainer.policy.adapters.load_state({path: 0 * a for path, a in trainer.policy.adapters.state().items()})
    trainer.step(2)
    assert seen[0] != seen[1]


def test_the_parity_bound_is_that_of_the_models_dtype(recipe) -> None:
    said = []
    for dtype in ("float32", "bfloat16"):
        run = prepare(load_recipe(recipe, [f"model.dtype={dtype}"]))
        said.append(check_parity(run.trainer.policy, run.trainer.engine, run.tasks[:1], 0))
    assert "bound on the mean 1e-03" in said[0]
    assert "bound on the mean 3e-02" in said[1]


def test_dynamic_sampling_replaces_groups_without_variance(recipe) -> None:
    """The first two prompts' groups are uniform; of the next two one is not."""
    trainer = prepare(load_recipe(recipe, ["rollout.dynamic_sampling=2"])).trainer
    calls = iter([[1, 1, 1, 1] * 2, [1, 1, 1, 1, 0, 1, 1, 1], [1, 0, 1, 1]])
    trainer.scorer = Scorer({"digits": lambda **_: next(calls)})
    metrics = trainer.step(1).values
    assert metrics["num_prompts"] == 5  # two, two more, and one more
    assert metrics["frac_reward_zero_std"] == 3 / 5
    assert trainer.tasks.cursor == 5
    assert metrics["grad_norm"] > 0


def test_entropy_is_told_even_of_a_step_that_trains_on_nothing(recipe) -> None:
    trainer = prepare(load_recipe(recipe)).trainer
    trainer.scorer = Scorer({"digits": lambda completions, **_: [1.0] * len(completions)})
    step = trainer.step(1)
    assert step.values["grad_norm"] == 0
    surprisals = [-p for group in step.groups for r in group.rollouts for p in r.trajectory.behaviour]
    assert step.values["entropy"] == pytest.approx(fmean(surprisals), rel=1e-5)


def test_dynamic_sampling_gives_up_in_the_end(recipe) -> None:
    trainer = prepare(load_recipe(recipe, ["rollout.dynamic_sampling=1"])).trainer
    trainer.scorer = Scorer({"digits": lambda completions, **_: [1.0] * len(completions)})
    metrics = trainer.step(1).values
    assert metrics["num_prompts"] == 4
    assert metrics["grad_norm"] == 0


def handed_to_the_update(recipe, *overrides: str) -> list:
    """The minibatches that a step makes."""

    class Noted(list):
        """In the update's place."""

        optimizer, steps_without_signal = None, 0

        def __call__(self, minibatches: list, n: int) -> Update:
            self.extend(minibatches)
            return Update(0.0, 0.0, {})

    trainer = prepare(load_recipe(recipe, overrides)).trainer
    trainer.update = Noted()
    trainer.step(1)
    return list(trainer.update)


def test_a_step_fixes_anchors_where_there_are_several_minibatches(recipe) -> None:
    first, second = handed_to_the_update(recipe, "optim.num_minibatches=2", "loss.beta=0.1")
    assert all(batch.anchor is None and batch.reference is not None for batch in first)
    assert all(batch.anchor is not None and batch.reference is not None for batch in second)


def test_a_step_puts_weight_only_on_the_tokens_of_highest_entropy(recipe) -> None:
    (batches,) = handed_to_the_update(recipe, "loss.top_entropy_quantile=0.25")
    tokens = sum(batch.trained.sum().item() for batch in batches)
    kept = sum((batch.weights > 0).sum().item() for batch in batches)
    assert tokens / 4 <= kept < tokens / 2  # a group's first tokens tie


def test_a_step_takes_penalties_off_rewards(recipe) -> None:
    (recipe.parent / "digits.py").write_text("def reward(completions, **_):\n    return [1.0] * len(completions)\n")
    assert handed_to_the_update(recipe) == [[]]  # rewards are uniform: nothing to learn
    text = recipe.read_text().replace("max_completion_length: 8", "max_completion_length: 200")
    recipe.write_text(text)  # so long that completions end by themselves, and differ in length
    (batches,) = handed_to_the_update(recipe, "advantage.soft_overlong_cache=199")
    assert any(mx.abs(batch.advantages).max().item() > 0 for batch in batches)


def test_beta_moves_to_its_end(recipe) -> None:
    cfg = load_recipe(recipe, ["loss.beta=0.4", "loss.beta_end=0", "optim.steps=5"])
    assert [penalty_weight(cfg.loss, 5, step) for step in range(1, 6)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    metrics = prepare(cfg).trainer.step(2).values
    assert metrics["beta"] == pytest.approx(0.3)
    assert "kl" in metrics


def test_what_the_adapter_has_learnt(make_policy) -> None:
    fresh, trained = make_policy(trained=False).policy.adapters, make_policy().policy.adapters
    assert fresh.delta() == 0
    state = trained.state()
    added = [
        2.0 * (a @ state[f"{path[:-1]}b"]) for path, a in state.items() if path.endswith("lora_a")
    ]  # scale is 2 by default
    expected = sum((delta**2).sum().item() for delta in added) ** 0.5
    assert trained.delta() == pytest.approx(expected, rel=1e-4)


def test_a_run_is_reproducible(recipe) -> None:
    def run() -> list[dict]:
        trainer = prepare(load_recipe(recipe)).trainer
        return [trainer.step(n).values for n in (1, 2)]

    def numbers(values: list[dict]) -> str:
        return json.dumps(
            [
                {k: v for k, v in step.items() if "time" not in k and "second" not in k and "peak" not in k}
                for step in values
            ]
        )

    assert numbers(run()) == numbers(run())
