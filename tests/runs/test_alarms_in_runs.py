"""Toy runs that go wrong, and what they say where: once, and not again after a resume."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from runs.driver import run

from grpo.alarm import Alarm
from grpo.alarms.past import PastSteps
from grpo.runs.checkpoint import load_checkpoint, newest_whole
from grpo.runs.loop import Loop
from grpo.telemetry.recorded import follow, read_run
from grpo.training import gap
from grpo.types import StepMetrics

FOLDER = Path("runs/toy")
STOPS = ("rollout.max_completion_length=24", f"rollout.stop_token_ids={list(range(20, 50))}")
"""Completions of a toy model that end at many lengths."""


def kinds(folder: Path = FOLDER) -> list[tuple[str, int]]:
    """The alarms of a run, as its files have them."""
    return [(alarm.kind, alarm.step) for alarm in read_run(folder).alarms]


def rewarded(body: str) -> None:
    """Make the toy recipe's reward what `body` computes of the place `n` and the text."""
    Path("digits.py").write_text(
        f"def reward(completions, trainer_state, prompts, **_):\n    step = trainer_state.global_step + 1\n"
        f"    return [{body} for n, text in enumerate(completions)]\n"
    )


def test_a_constant_reward_is_told_after_ten_steps_and_not_again_after_a_resume(recipe, caplog) -> None:
    rewarded("0.0")
    run(recipe, "optim.steps=12", "log.kl=null")
    assert ("no_signal", 10) in kinds()
    said = [line for line in caplog.messages if "10 steps in a row had no signal" in line]
    assert [line.partition(":")[0] for line in said] == ["step 10"]
    checkpoint, _ = newest_whole(FOLDER / "checkpoints")
    assert "no_signal" in load_checkpoint(checkpoint)[0].past.told
    caplog.clear()
    run(recipe, "optim.steps=24", "log.kl=null", changed=True)
    assert [kind for kind, _ in kinds()].count("no_signal") == 1
    assert "had no signal" not in caplog.text


def test_a_resumed_run_looks_back_over_the_stop(recipe) -> None:
    rewarded("0.0")
    run(recipe, "optim.steps=6")
    run(recipe, "optim.steps=12", changed=True)
    assert ("no_signal", 10) in kinds()


def test_with_another_reward_it_looks_back_on_nothing(recipe) -> None:
    rewarded("0.0")
    run(recipe, "optim.steps=6")
    rewarded("0.5")
    run(recipe, "optim.steps=12", changed=True)
    assert "no_signal" not in [kind for kind, _ in kinds()]


def test_a_reward_that_fails_and_one_that_takes_too_long(recipe) -> None:
    settings = ["rewards.0.max_failure_rate=1", "optim.steps=1"]
    rewarded("{}[n]")
    run(recipe, *settings)
    (alarm,) = [alarm for alarm in read_run(FOLDER).alarms if alarm.kind == "failed_rewards"]
    assert "'digits' failed on 100% (error) of the completions of this step; the first error: KeyError: 0" in alarm.what
    rewarded("__import__('time').sleep(5)")
    run(recipe, *settings, "rewards.0.isolation=process", "rewards.0.timeout=0.2", overwrite=True)
    (alarm,) = [alarm for alarm in read_run(FOLDER).alarms if alarm.kind == "failed_rewards"]
    assert "100% (timeout)" in alarm.what


def test_a_reward_that_counts_length(recipe) -> None:
    rewarded("float(len(text))")
    run(recipe, "optim.steps=10", *STOPS, "alarms.length_correlation=0.6")
    assert ("length", 10) in kinds()


def test_kl_and_a_gradient_that_is_not_finite(recipe) -> None:
    rewarded("float(n)")
    run(recipe, "optim.steps=3", "log.kl=1", "optim.learning_rate=3", "alarms.kl=1")
    assert "kl" in [kind for kind, _ in kinds()]
    Path("odd.py").write_text("def odd(logprobs, batch, cfg):\n    return logprobs / 0\n")
    run(recipe, "optim.steps=1", "loss.use=odd.py:odd", overwrite=True)
    assert ("gradient", 1) in kinds()


def test_the_evaluation_falls_while_the_reward_rises(recipe) -> None:
    """Held-out prompts are right after step 2 alone, and training's reward is larger after it."""
    rewarded("(0.5, 1.0, 0.0)[step - 1] if 'apart' in prompts[0] else 10.0 * (step == 3) + n / 8")
    Path("apart.jsonl").write_text("".join(f'{{"question": "apart {n}", "answer": "1"}}\n' for n in range(8)))
    run(recipe, "optim.steps=3", "eval={source: apart.jsonl, split: train, every: 1, prompts: 8, samples: 2}")
    assert ("overfitting", 3) in kinds()
    (line,) = [line for line in (FOLDER / "eval.jsonl").read_text().splitlines() if "overfitting" in line]
    assert json.loads(line)["alarms"][0]["what"].startswith("the reward rose from ")
    checkpoint, _ = newest_whole(FOLDER / "checkpoints")
    assert load_checkpoint(checkpoint)[0].after.alarms[0].kind == "overfitting"


def test_sampler_and_trainer_apart(recipe, monkeypatch) -> None:
    monkeypatch.setattr(gap, "gap_bound", lambda *_: 1e-9)
    run(recipe, "optim.steps=1", "optim.max_logp_difference=null")
    assert ("sampler", 1) in kinds()


def test_filters_that_leave_few_tokens(recipe) -> None:
    rewarded("float(n)")
    run(recipe, "optim.steps=5", "alarms.effective_sample_size=1", "rollout.top_k=20")
    assert ("ratios", 5) in kinds()


def test_the_entropy_of_a_model_whose_rewards_are_equal(recipe) -> None:
    """It falls by 7 % while the longer answers are punished."""
    rewarded("-float(len(text)) if step <= 8 else 0.0")
    run(recipe, "optim.steps=18", "optim.learning_rate=0.05", "alarms.entropy=0.97", "rollout.num_generations=8")
    assert "entropy" in [kind for kind, _ in kinds()]


def test_off_says_nothing_and_a_right_run_has_nothing_to_say(recipe, caplog) -> None:
    rewarded("0.0")
    run(recipe, "optim.steps=1", "alarms=off")
    assert kinds() == []
    assert "alarms" not in (FOLDER / "metrics.jsonl").read_text()
    assert not [line for line in caplog.messages if line.startswith("step ")]


def test_all_loggers_are_told(recipe, run_cli, caplog) -> None:
    """The terminal, the file, TensorBoard, the report, and those who follow."""
    rewarded("0.0")
    run_cli("train", recipe, "optim.steps=1", "log.tensorboard=true")
    said = "step 1: no group has different rewards (their mean is 0), so nothing was learned."
    assert any(line.startswith(said) for line in caplog.messages)
    (line,) = map(json.loads, (FOLDER / "metrics.jsonl").read_text().splitlines())
    assert "equal_rewards" in [alarm["kind"] for alarm in line["alarms"]]
    assert b"alarms/equal_rewards" in next((FOLDER / "tensorboard").iterdir()).read_bytes()
    assert run_cli("report", FOLDER).code == 0
    assert "no group has different rewards" in (FOLDER / "report.html").read_text()
    text = io.StringIO()
    follow(FOLDER, Console(file=text, width=500))
    assert said in text.getvalue()


def test_of_several_processes_the_first_speaks(caplog) -> None:
    record = StepMetrics(1, {}, alarms=(Alarm("kl", 1, "far", "Read."),))
    for first, said in ((False, []), (True, ["step 1: far. Read."])):
        Loop._warn(SimpleNamespace(ranks=SimpleNamespace(first=first)), record)
        assert caplog.messages == said


def test_a_rule_that_breaks_leaves_the_weights_with_their_step(recipe, monkeypatch) -> None:
    def broken(metrics: StepMetrics, past: PastSteps, _: object) -> tuple[StepMetrics, PastSteps]:
        if metrics.step == 2:
            raise ZeroDivisionError
        return metrics, past

    monkeypatch.setattr("grpo.runs.loop.after_step", broken)
    with pytest.raises(ZeroDivisionError):
        run(recipe, "optim.steps=3")
    checkpoint, _ = newest_whole(FOLDER / "checkpoints")
    assert load_checkpoint(checkpoint)[0].step == 2
