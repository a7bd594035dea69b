"""The smaller parts of training: schedule, checkpoints, evaluation, metrics, signals, parity, the plan."""

import json
import os
import signal
from pathlib import Path

import mlx.core as mx
import pytest

from grpo.config import OptimConfig
from grpo.errors import RunError, UserError
from grpo.recipe import load_recipe
from grpo.training import parity
from grpo.training.checkpoint import checkpoints, save_checkpoint, step_of
from grpo.training.evaluate import bootstrap_interval
from grpo.training.folder import HEADER, WRITTEN, newest_checkpoint, run_folder
from grpo.training.metrics import step_metrics
from grpo.training.parity import check_parity
from grpo.training.schedule import learning_rate, penalty_weight
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
    with pytest.raises(UserError, match="no checkpoint yet"):
        newest_checkpoint(recipe.parent)


def killed(folder, name: str) -> None:
    """What a run leaves that was to replace another and was killed: its recipe, and the former one aside."""
    (folder / ".former").mkdir()
    for path in list(folder.iterdir()):
        if path.name != ".former":
            path.rename(folder / ".former" / path.name)
    (folder / "recipe.yaml").write_text(HEADER + f"# {name}")


def test_a_run_killed_while_replacing_another(recipe) -> None:
    cfg = load_recipe(recipe)
    folder = Path(cfg.output_dir)
    with run_folder(cfg, overwrite=False):
        (folder / "metrics.jsonl").write_text("a")
    killed(folder, "b")  # before its first step: the former run comes back
    with pytest.raises(UserError, match="holds another run"), run_folder(cfg, overwrite=False):
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "recipe.yaml"]
    assert "# b" not in (folder / "recipe.yaml").read_text()
    killed(folder, "c")
    (folder / "metrics.jsonl").write_text("c")  # after it: the former run is gone
    with run_folder(cfg, overwrite=True):
        assert not (folder / "metrics.jsonl").exists()
        assert (folder / ".former/metrics.jsonl").read_text() == "c"
    assert (folder / "metrics.jsonl").read_text() == "c"  # nothing was on record, so it came back


@pytest.mark.parametrize("moved", range(5))
def test_a_run_killed_while_putting_another_aside(recipe, moved: int) -> None:
    cfg = load_recipe(recipe)
    folder = Path(cfg.output_dir)
    with run_folder(cfg, overwrite=False):
        for name in ("metrics.jsonl", "eval.jsonl", "checkpoints", "not_finite", "wandb"):
            (folder / name).write_text(name)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    (folder / ".former").mkdir()
    for name in WRITTEN[:moved]:
        (folder / name).rename(folder / ".former" / name)
    with pytest.raises(UserError, match="holds another run"), run_folder(cfg, overwrite=False):
        pass
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_written_keeps_its_run(recipe, monkeypatch) -> None:
    cfg = load_recipe(recipe)
    folder = Path(cfg.output_dir)
    with run_folder(cfg, overwrite=False):
        (folder / "metrics.jsonl").write_text("a")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match="No space left on device"), run_folder(cfg, overwrite=True):
            pass
    assert (folder / "metrics.jsonl").read_text() == "a"
    assert (folder / "recipe.yaml").exists()
    assert not (folder / ".former").exists()


def test_a_signal_before_the_first_step_leaves_no_checkpoint(recipe, tmp_path) -> None:
    stop = StopRequest()
    stop.signal = signal.SIGINT
    outcome = prepare(load_recipe(recipe)).trainer.run(tmp_path / "run", lambda record: None, stop)
    assert (outcome.step, outcome.checkpoint) == (0, None)


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
        return Rollout(Completion((1,) * length, None, "", reason), {"r": reward}, reward=reward)

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


def test_a_signal_during_an_evaluation_loses_nothing(recipe, tmp_path) -> None:
    recipe.write_text(recipe.read_text() + "eval: {split: train, every: 1, prompts: 1}\ncheckpoint: {every: 99}\n")
    trainer = prepare(load_recipe(recipe)).trainer
    measure, stop = trainer.evaluate, StopRequest()

    def interrupted(step: int):
        if step == 1:
            stop.signal = signal.SIGINT
        return measure(step)

    trainer.evaluate = interrupted
    outcome = trainer.run(tmp_path / "run", lambda record: None, stop)
    assert (outcome.step, outcome.stopped_by) == (1, signal.SIGINT)
    assert step_of(outcome.checkpoint) == 1


def test_an_error_in_a_later_step_leaves_the_last_one_saved(recipe, tmp_path) -> None:
    trainer = prepare(load_recipe(recipe, ["optim.steps=3", "checkpoint.every=99"])).trainer
    trainer.scorer.rewards = {"digits": lambda completions, **_: [float("nan")] * len(completions)}
    trainer.scorer._in_a_row = {"digits": 0}  # as if it had worked before
    with pytest.raises(RunError, match="failed on every completion"):
        trainer.run(tmp_path / "run", lambda record: None, StopRequest())
    assert [step_of(found) for found in checkpoints(tmp_path / "run/checkpoints")] == [2]


def test_what_nothing_scored_is_not_wrong_in_an_evaluation(recipe) -> None:
    recipe.write_text(recipe.read_text() + "eval: {split: train, prompts: 4, samples: 2}\n")
    trainer = prepare(load_recipe(recipe)).trainer
    trainer.scorer.rewards = {"digits": lambda completions, **_: [1.0, None, None, None] * (len(completions) // 4)}
    trainer.evaluate.grader = "digits"
    metrics = trainer.evaluate(0)
    assert metrics.n == 1
    assert metrics.values["greedy"] == 1.0
    trainer.scorer.rewards = {"digits": lambda completions, **_: [None] * len(completions)}
    with pytest.raises(RunError, match="'digits', scored no completion"):
        trainer.evaluate(0)


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
    assert plan.phases["rollout cache"] == 8 * (longest + 8) * 2 * keys_and_values * 4
    assert plan.total > plan.stays["weights"]


def test_each_step_samples_anew(recipe) -> None:
    trainer = prepare(load_recipe(recipe)).trainer
    seen = []
    trainer.tasks.take = lambda n: run_tasks[:n]
    run_tasks = prepare(load_recipe(recipe)).tasks
    generate = trainer.engine.generator.generate
    trainer.engine.generator.generate = lambda *args: seen.append(generate(*args)) or seen[-1]
    trainer.step(1)
    trainer.policy.adapters.load_state({path: 0 * a for path, a in trainer.policy.adapters.state().items()})
    trainer.step(2)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_evaluation_samples_at_the_recipes_temperature(recipe, temperature: float) -> None:
    recipe.write_text(recipe.read_text() + "eval: {split: train, prompts: 1, samples: 2}\n")
    trainer = prepare(load_recipe(recipe, [f"rollout.temperature={temperature}"])).trainer
    used = []
    generate = trainer.engine.generator.generate
    trainer.engine.generator.generate = lambda r, s, *rest: used.append(s.temperature) or generate(r, s, *rest)
    trainer.evaluate(0)
    assert used == [0.0, temperature]


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
    trainer.scorer.rewards = {"digits": lambda **_: next(calls)}
    metrics = trainer.step(1).values
    assert metrics["num_prompts"] == 5  # two, two more, and one more
    assert metrics["frac_reward_zero_std"] == 3 / 5
    assert trainer.tasks.cursor == 5
    assert metrics["grad_norm"] > 0


def test_entropy_is_told_even_of_a_step_that_trains_on_nothing(recipe) -> None:
    trainer = prepare(load_recipe(recipe)).trainer
    trainer.scorer.rewards = {"digits": lambda completions, **_: [1.0] * len(completions)}
    uniform = trainer.step(1).values
    assert uniform["grad_norm"] == 0
    again = prepare(load_recipe(recipe, ["loss.beta=1e-9"])).trainer  # the penalty keeps every row in the update
    again.scorer.rewards = trainer.scorer.rewards
    assert uniform["entropy"] == pytest.approx(again.step(1).values["entropy"], rel=1e-4)


def test_dynamic_sampling_gives_up_in_the_end(recipe) -> None:
    trainer = prepare(load_recipe(recipe, ["rollout.dynamic_sampling=1"])).trainer
    trainer.scorer.rewards = {"digits": lambda completions, **_: [1.0] * len(completions)}
    metrics = trainer.step(1).values
    assert metrics["num_prompts"] == 4
    assert metrics["grad_norm"] == 0


def handed_to_the_update(recipe, *overrides: str) -> list:
    """The minibatches that a step makes."""
    trainer, seen = prepare(load_recipe(recipe, overrides)).trainer, []
    trainer.update = lambda minibatches, n: seen.extend(minibatches) or Update(0.0, 0.0, {})
    trainer.step(1)
    return seen


def test_a_step_fixes_old_logprobs_where_there_are_several_minibatches(recipe) -> None:
    first, second = handed_to_the_update(recipe, "optim.num_minibatches=2", "loss.beta=0.1")
    assert all(batch.old_logprobs is None and batch.ref_logprobs is not None for batch in first)
    assert all(batch.old_logprobs is not None and batch.ref_logprobs is not None for batch in second)


def test_a_step_puts_weight_only_on_the_tokens_of_highest_entropy(recipe) -> None:
    whole, cut = (
        sum(
            (batch.weights > 0).sum().item()
            for batch in handed_to_the_update(recipe, f"loss.top_entropy_quantile={quantile}")[0]
        )
        for quantile in (1.0, 0.25)
    )
    assert 0 < cut < whole / 2  # a group's first tokens tie


def test_a_step_takes_penalties_off_rewards(recipe) -> None:
    (recipe.parent / "digits.py").write_text("def reward(completions, **_):\n    return [1.0] * len(completions)\n")
    assert handed_to_the_update(recipe) == [[]]  # rewards are uniform: nothing to learn
    text = recipe.read_text().replace("max_completion_length: 8", "max_completion_length: 200")
    recipe.write_text(text)  # so long that completions end by themselves, and differ in length
    (batches,) = handed_to_the_update(recipe, "advantage.soft_overlong_cache=199")
    assert any(mx.abs(batch.advantages).max().item() > 0 for batch in batches)


def test_beta_moves_to_its_end(recipe) -> None:
    cfg = load_recipe(recipe, ["loss.beta=0.4", "loss.beta_end=0", "optim.steps=5"])
    assert [penalty_weight(cfg, step) for step in range(1, 6)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
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
        return json.dumps([{k: v for k, v in step.items() if "time" not in k and "second" not in k} for step in values])

    assert numbers(run()) == numbers(run())
