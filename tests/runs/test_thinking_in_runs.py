"""Runs whose conversations go on without earlier thinking: planned, resumed to the bit, evaluated and made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs.conversing import conversing, thinker, thinks  # noqa: F401
from runs.driver import run, same_end
from runs.test_conversing_runs import trajectories
from runs.test_resume import interrupt_in

from grpo.environments import scheduler
from grpo.environments.chat import Chat
from grpo.recipes import load_recipe
from grpo.runs.completions import read_completions, stored_steps
from grpo.runs.prepare import prepare

ASKER = """
import random

class Asker:
    def reset(self, **row):
        return f" {random.randint(1, 9)}?"
    def step(self, message):
        return f"Sure, {random.randint(1, 9)}?"
    def get_reward(self):
        return random.random()
"""
ARGUMENTS = ("environment.use=asker.py:Asker", "environment.thinking=drop", "model.name=thinker")


@pytest.fixture
def dropping(conversing: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    thinker(toy_folder, Path("thinker"))
    Path("asker.py").write_text(ASKER)
    monkeypatch.setattr(Chat, "parse", thinks)
    monkeypatch.setattr(scheduler, "GRACE", 600.0)
    return conversing


@pytest.mark.slow
def test_stopped_and_resumed_is_never_stopped(dropping: Path) -> None:
    """To the bit."""
    run(dropping, "output_dir=whole", *ARGUMENTS)
    run(dropping, "output_dir=parts", *ARGUMENTS, change=interrupt_in(3, "rollout"))
    run(dropping, "output_dir=parts", *ARGUMENTS, resume=True)
    same_end(Path("whole"), Path("parts"))
    rows = trajectories("whole")
    assert sum(len(row.begins) for row in rows) > 10
    assert [row.begins for row in rows] == [row.begins for row in trajectories("parts")]
    lines = Path("whole/metrics.jsonl").read_text().splitlines()
    gap = [json.loads(line)["sampling/sampling_logp_difference/mean"] for line in lines]
    assert max(gap) < 1e-5


TOGETHER = (
    "advantage.turns=turn",
    "advantage.soft_overlong_cache=48",
    "loss={type: gspo_token, beta: 0.01, importance_sampling_correction: token_truncate, top_entropy_quantile: 0.5}",
    "optim={steps: 3, num_minibatches: 2, num_iterations: 2, micro_batch_tokens: 128}",
    "rollout.dynamic_sampling=1",
    "rollout.min_completion_length=3",
    "rollout.top_k=9",
    "environment.max_turn_tokens=12",
)


@pytest.mark.slow
def test_with_all_that_changes_what_is_learned(dropping: Path) -> None:
    """Rewards of turns, penalties, filters, minibatches and micro-batches at once: resumed to the bit."""
    graded = ASKER.replace('return f"Sure', 'return Step(reward=random.random(), result=f"Sure')
    Path("asker.py").write_text("from grpo import Step\n" + graded.replace('?"\n    def get', '?")\n    def get'))
    run(dropping, "output_dir=whole", *ARGUMENTS, *TOGETHER)
    run(dropping, "output_dir=parts", *ARGUMENTS, *TOGETHER, change=interrupt_in(2, "rollout"))
    run(dropping, "output_dir=parts", *ARGUMENTS, *TOGETHER, resume=True)
    same_end(Path("whole"), Path("parts"))
    told = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert max(record["sampling/unfiltered_logp_difference/mean"] for record in told) < 1e-5
    assert all(record["reward_penalty"] > 0 and record["skipped_updates"] == 0 for record in told)
    groups = [group for path in stored_steps(Path("whole/completions")) for group in read_completions(path)[1]]
    turned = [r for group in groups for r in group.rollouts if r.turn_advantages is not None]
    assert any(len(set(r.turn_advantages)) > 1 and r.trajectory.begins for r in turned)
    assert all(len(r.turn_advantages) == r.trajectory.turns for r in turned)


@pytest.mark.slow
def test_what_commands_make_of_it(dropping: Path, run_cli) -> None:
    held_out = "eval={split: train, prompts: 2, samples: 2}"
    ran = run_cli("train", dropping, *ARGUMENTS, "optim.steps=2", held_out, "output_dir=run")
    assert ran.code == 0, ran.err
    assert "chat: earlier thinking is left out when a user's message follows" in " ".join(ran.out.split())
    assert "stays in the conversation" not in " ".join(ran.out.split())
    again = run_cli("replay", "run", "--step", "2")
    assert "its completions are those that the run stored" in again.out
    assert run_cli("eval", "run").code == 0


def test_the_plan_counts_the_end_of_the_prompt_for_each_completion(dropping: Path) -> None:
    """New rows do not begin with it: the model's answer follows the prompt, and not the beginning of an answer."""
    plans = []
    for thinking in ("keep", "drop"):
        run_ = prepare(load_recipe(dropping, [*ARGUMENTS, f"environment.thinking={thinking}"]))
        run_.opened.close()
        plans.append((run_.plan.waiting, run_.trainer.engine.environment.tail(run_.tasks[0])))
    (kept, none), (dropped, tail) = plans
    assert none == 0 < tail
    assert dropped - kept == 8 * tail * 2 * 2 * 16 * 2 * 4  # rows; two heads of 16, of each, in two layers, four bytes


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            "model.name=talker",
            "thinking: drop has no effect: the model's chat template does not leave out thinking",
        ),
        (
            "data.chat_template=never",
            "thinking: drop has no effect: prompts do not use a chat template",
        ),
        ("environment.use=room.py:Room", "environment.thinking: drop does nothing: Room does not reply as the user"),
    ],
)
def test_where_it_would_do_nothing_it_is_refused(dropping: Path, run_cli, changed: str, said: str) -> None:
    ran = run_cli("train", dropping, *ARGUMENTS, changed, "--dry-run")
    assert ran.code == 2
    assert said in " ".join(ran.err.split())
