"""The smaller parts of training: schedule, checkpoints, evaluation, metrics, signals, parity, the plan."""

import json
import os
import signal

import mlx.core as mx
import pytest

from grpo.config import OptimConfig
from grpo.errors import RunError, UserError
from grpo.recipe import load_recipe
from grpo.training import parity
from grpo.training.checkpoint import checkpoints, save_checkpoint, step_of
from grpo.training.evaluate import bootstrap_interval
from grpo.training.folder import open_run
from grpo.training.metrics import step_metrics
from grpo.training.parity import check_parity
from grpo.training.schedule import learning_rate
from grpo.training.setup import prepare
from grpo.training.signals import StopRequest
from grpo.training.update import Update
from grpo.types import Completion, Group, Rollout, Task


def rates(kind: str, warmup: int = 0) -> list[float]:
    cfg = OptimConfig(steps=4 + warmup, learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=warmup)
    return [learning_rate(cfg, step) for step in range(1, cfg.steps + 1)]


def test_schedules_by_hand() -> None:
    assert rates("constant", 2) == [0.5, 1, 1, 1, 1, 1]
    assert rates("linear", 2) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates("cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_checkpoints_keep_the_newest(make_policy, tmp_path) -> None:
    adapters = make_policy().policy.adapters
    for step in (5, 10, 100):
        path = save_checkpoint(tmp_path, step, adapters, keep=2)
    assert [step_of(found) for found in checkpoints(tmp_path)] == [10, 100]
    assert path == tmp_path / "step-000100"
    assert {file.name for file in path.iterdir()} == {"adapters.safetensors", "adapter_config.json", "state.json"}
    assert sorted(os.listdir(tmp_path)) == ["step-000010", "step-000100"]


def test_a_checkpoint_that_was_not_finished_is_not_one(make_policy, tmp_path, monkeypatch) -> None:
    adapters = make_policy().policy.adapters
    save_checkpoint(tmp_path, 5, adapters, keep=3)

    def fail(folder) -> None:
        (folder / "adapters.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(adapters, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 10, adapters, keep=3)
    assert [step_of(found) for found in checkpoints(tmp_path)] == [5]


def test_a_run_without_a_checkpoint_says_so(recipe) -> None:
    (recipe.parent / "recipe.yaml").write_text(recipe.read_text())
    with pytest.raises(UserError, match="no checkpoint yet"):
        open_run(recipe.parent)


def test_bootstrap_intervals() -> None:
    assert bootstrap_interval([1.0] * 50, seed=0) == (1.0, 1.0)
    low, high = bootstrap_interval([0.0, 1.0] * 200, seed=0)
    # the normal approximation: 0.5 ± 1.96 · 0.5 / √400
    assert low == pytest.approx(0.451, abs=0.01)
    assert high == pytest.approx(0.549, abs=0.01)
    assert bootstrap_interval([0.0, 1.0] * 200, seed=0) == (low, high)


def test_evaluation_by_hand(recipe) -> None:
    """Two questions, of which a scripted model gets the first right in 3 of 4 samples and greedily."""
    text = recipe.read_text().replace("digits.py:reward", "right.py:reward")
    recipe.write_text(text + "eval: {split: train, prompts: 2, samples: 4}\n")
    (recipe.parent / "right.py").write_text(
        "def reward(completions, **columns):\n    return [1.0 if c == 'yes' else 0.5 for c in completions]\n"
    )
    evaluate = prepare(load_recipe(recipe)).trainer.evaluate
    asked = []

    def generate(requests, sampling, _key, logprobs):
        asked.append((len(requests), requests[0].n, sampling.temperature, logprobs))
        first = ["yes", "no", "yes", "yes"][: requests[0].n]
        return [[Completion((1,), None, text, "stop") for text in texts] for texts in (first, ["no"] * requests[0].n)]

    evaluate.engine.generator.generate = generate
    metrics = evaluate(7)
    assert asked == [(2, 1, 0.0, False), (2, 4, 1.0, False)]
    assert (metrics.step, metrics.n) == (7, 2)
    assert metrics.values == {"greedy": 0.5, "avg@4": 0.375, "pass@4": 0.5}


def test_step_metrics_by_hand() -> None:
    def rollout(length: int, reward: float | None, reason: str = "stop") -> Rollout:
        return Rollout(Completion((1,) * length, None, "", reason), {"r": reward}, reward)

    groups = [
        Group(Task(0, "?", (1,), {}), (rollout(2, 1.0), rollout(4, 0.0))),
        Group(Task(1, "?", (1,), {}), (rollout(6, 0.5, "length"), rollout(8, None))),
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
    assert [values[f"completions/{name}_terminated_length"] for name in ("mean", "min", "max")] == [14 / 3, 2, 8]
    assert values["completions/clipped_ratio"] == 0.25
    assert [values[name] for name in ("solved_all", "solved_none", "mixed")] == [0, 0.5, 0.5]
    assert "tokens" not in values
    assert (values["entropy"], values["clip_ratio/low_mean"]) == (0.5, 0.1)
    assert (values["loss"], values["grad_norm"], values["learning_rate"]) == (-0.1, 2.0, 1e-3)
    assert (values["num_tokens"], values["rollout_tokens_per_second"], values["step_time"]) == (20, 10, 3)


def test_a_signal_asks_and_a_second_one_ends() -> None:
    told = []
    with StopRequest(lambda: told.append(1)) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert told == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_parity_is_measured_and_a_gap_stops_the_run(recipe, monkeypatch) -> None:
    run = prepare(load_recipe(recipe))
    policy, engine = run.trainer.policy, run.trainer.engine
    assert "mean gap" in check_parity(policy, engine, run.tasks, 0)
    # A model whose cache is handled wrongly: every token is decoded at the position of the one before it.
    from grpo.generation.cache import LayerCache

    monkeypatch.setattr(LayerCache, "offset", property(lambda self: self._slots.positions - 1))
    with pytest.raises(RunError, match="training on it would not be sound"):
        check_parity(policy, engine, run.tasks, 0)
    assert parity.BOUNDS[mx.float32] == 1e-3


def test_the_plan_counts_what_there_is(recipe) -> None:
    run = prepare(load_recipe(recipe))
    plan = run.plan
    assert (plan.steps, plan.prompts, plan.rows) == (2, 2, 8)
    longest = max(len(task.prompt_ids) for task in run.tasks)
    assert plan.tokens == 8 * (longest + 8)
    state = run.trainer.policy.adapters.state()
    assert plan.trained == sum(array.size for array in state.values())
    keys_and_values = 2 * 2 * 16  # of two heads of 16, in each of two layers, four bytes each
    assert plan.bytes["rollout cache"] == 8 * (longest + 8) * 2 * keys_and_values * 4
    assert plan.total > plan.bytes["weights"]


def test_a_run_is_reproducible(recipe) -> None:
    def run() -> list[dict]:
        trainer = prepare(load_recipe(recipe)).trainer
        return [trainer.step(n).values for n in (1, 2)]

    def numbers(values: list[dict]) -> str:
        return json.dumps([{k: v for k, v in step.items() if "time" not in k and "second" not in k} for step in values])

    assert numbers(run()) == numbers(run())
