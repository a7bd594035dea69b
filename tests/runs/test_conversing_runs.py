"""Runs in conversations: resumed to the bit, stopped in a call, rehearsed, evaluated, replayed, and closed."""

import os
import time
from pathlib import Path

import pytest
from runs.conversing import conversing  # noqa: F401
from runs.driver import run, same_end
from runs.test_resume import interrupt_in
from telemetry.pages import data_in, rows_in

from grpo.environments import scheduler
from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.completions import read_completions, stored_steps
from grpo.runs.prepare import prepare
from grpo.runs.resume import find_start
from grpo.types import Trajectory


def trajectories(folder: str) -> list[Trajectory]:
    groups = [group for path in stored_steps(Path(folder) / "completions") for group in read_completions(path)[1]]
    return [rollout.trajectory for group in groups for rollout in group.rollouts]


def processes() -> set[int]:
    """The processes in which the environment lived, as far as they are there."""
    named = {int(pid) for pid in Path("processes").read_text().split()}
    assert named
    return {pid for pid in named if Path(f"/proc/{pid}").exists()}


def gone(within: float = 20.0) -> bool:
    deadline = time.monotonic() + within
    while processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes()


def test_stopped_and_resumed_is_never_stopped(conversing: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """To the bit, with an environment and tools that draw random numbers, in two processes."""
    monkeypatch.setattr(scheduler, "GRACE", 600.0)  # on a busy machine too
    conversing.write_text(conversing.read_text().replace("workers: 1", "workers: 2"))
    run(conversing, "output_dir=whole")
    run(conversing, "output_dir=parts", change=interrupt_in(3, "rollout"))
    run(conversing, "output_dir=parts", resume=True)
    same_end(Path("whole"), Path("parts"))
    conversed = [one.conversation for one in trajectories("whole")]
    assert sum(talk.calls for talk in conversed) > 10
    assert len({talk.prompt[-1]["content"] for talk in conversed}) > 4  # what `reset` drew, row by row
    drawn = [message["content"] for talk in conversed for message in talk.messages if message["role"] == "tool"]
    assert len(set(drawn)) > 5
    assert gone()


def test_prompts_have_the_tools_and_what_reset_adds_and_neither_is_learned_from(
    conversing: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared = prepare(load_recipe(conversing, ["output_dir=run"]))
    with prepared.opened:
        tokenizer = prepared.trainer.engine.generator.tokenizer
        group = prepared.trainer.engine.rollout(prepared.tasks[:1], 4, 1.0, [7])[0]
        assert tokenizer.decode(list(group.task.prompt_ids)).startswith("<|im_start|>system\ndraw <|im_end|>")
        for rollout in group.rollouts:
            one = rollout.trajectory
            first = one.trained.index(True)
            whole = tokenizer.decode([*group.task.prompt_ids, *one.token_ids[:first]])
            asked = one.conversation.prompt[-1]["content"]
            assert asked.startswith(f"{prepared.tasks[0].prompt} Begin with ")
            assert whole.endswith(f"user\n{asked}<|im_end|>\n<|im_start|>assistant\n")
    assert gone()


INTERRUPTING = """
    def draw(self, most: int) -> str:
        '''
        Draws a number.

        Args:
            most: The largest.
        '''
        import time
        if not os.path.exists("asked"):
            open("asked", "w").close()
            os.kill(PID, 2)
        time.sleep(600)
"""


def test_ctrl_c_in_a_tool_call_ends_the_run_and_its_processes(conversing: Path, run_cli) -> None:  # noqa: F811
    source = Path("room.py").read_text()
    head, _, tail = source.partition("    async def draw")
    rest = tail[tail.index("    def get_reward") :]
    Path("room.py").write_text(head + INTERRUPTING.replace("PID", str(os.getpid())).lstrip("\n") + rest)
    began = time.monotonic()
    ran = run_cli("train", conversing, "environment.timeout=500")
    assert Path("asked").exists()
    assert ran.code == 130
    assert "stopped before the first step" in ran.out
    assert time.monotonic() - began < 300
    assert gone()


def test_a_dry_run_begins_one_conversation_alone(conversing: Path, run_cli) -> None:  # noqa: F811
    ran = run_cli("train", conversing, "--dry-run")
    assert ran.code == 0, ran.err
    assert "environment Room: the model calls draw; it rewards a conversation at its end (get_reward)" in ran.out
    assert "chat: a turn ends with <|im_end|>; tool calls are read as" in ran.out
    assert Path("resets").read_text() == "x"
    assert gone()


def test_an_environment_that_has_changed_does_not_go_on(conversing: Path, run_cli) -> None:  # noqa: F811
    first = run_cli("train", conversing, "optim.steps=1")
    assert first.code == 0, first.err
    for file, where in (("room.py", "room.py:Room"), ("helper.py", "room.py:Room, helper.py")):
        before = Path(file).read_text()
        Path(file).write_text(before + "\n# changed\n")
        ran = run_cli("train", conversing, "optim.steps=1", "--resume")
        assert ran.code == 2
        assert "was written with another recipe, other code or other data" in ran.err
        assert f"{where}: " in ran.err
        Path(file).write_text(before)
    Path("room.py").write_text(Path("room.py").read_text() + "\n# changed\n")
    assert run_cli("train", conversing, "optim.steps=1", "--resume-changed").code == 0
    assert gone()


@pytest.mark.slow
def test_what_commands_make_of_a_run(conversing: Path, run_cli) -> None:  # noqa: F811
    ran = run_cli("train", conversing, "optim.steps=2", "eval={split: train, prompts: 2, samples: 2}", "output_dir=run")
    assert ran.code == 0, ran.err
    assert "rewards/Room" in ran.out
    again = run_cli("replay", "run", "--step", "2")
    assert "its completions are those that the run stored" in again.out
    assert "→ draw(most=" in again.out
    measured = run_cli("eval", "run")
    assert measured.code == 0, measured.err
    assert "rewards/Room" in measured.out
    told = run_cli("report", "run")
    assert told.code == 0, told.err
    data = data_in(Path("run/report.html").read_text())
    assert "draw" in {turn["who"] for row in rows_in(data) for turn in row["turns"]}
    assert "room.py:Room" in dict(data["runs"][0]["settings"])["environments and tools"]
    assert gone()


def test_a_mistake_after_the_processes_began_ends_them(conversing: Path, run_cli) -> None:  # noqa: F811
    ran = run_cli("train", conversing, "eval={split: train}", "checkpoint.metric_for_best_model=pass@9")
    assert (ran.code, "is not measured" in ran.err) == (2, True)
    assert gone()


RESCORED = """
def talked(completions, prompts, **columns):
    assert all("Begin with" in messages[-1]["content"] for messages in prompts)
    return [float(sum(message["role"] == "tool" for message in messages)) for messages in completions]

def summed(completions, environments, **columns):
    return [environment.sum for environment in environments]
"""


def test_rescored_rewards_see_the_messages(conversing: Path, run_cli) -> None:  # noqa: F811
    run(conversing, "optim.steps=1", "output_dir=run")
    Path("again.py").write_text(RESCORED)
    calls = [one.conversation.messages for one in trajectories("run")]
    results = [sum(message["role"] == "tool" for message in messages) for messages in calls]
    ran = run_cli("rewards", "score", "run", "--reward", "again.py:talked")
    assert ran.code == 0, ran.err
    assert f"{sum(results) / len(results):.4f}" in ran.out
    refused = run_cli("rewards", "score", "run", "--reward", "again.py:summed")
    assert refused.code == 2
    assert "takes `environments`, but the environments of stored conversations no longer exist" in refused.err


@pytest.mark.parametrize(
    ("changed", "kept"),
    [("environment.max_turns=2", False), ("tools=[calculator]", False), ("checkpoint.every=9", True)],
)
def test_rewards_of_other_conversations_are_not_compared(
    conversing: Path,  # noqa: F811
    changed: str,
    kept: bool,
) -> None:
    run(conversing, "optim.steps=2")
    start = find_start(load_recipe(conversing, ["optim.steps=2", changed]), changed=True)
    assert bool(start.state.rewards) == kept


def test_held_out_rows_that_an_environment_cannot_begin_with_are_refused_at_the_start(conversing: Path) -> None:  # noqa: F811
    Path("room.py").write_text("class Room:\n    def reset(self, answer, **row): ...\n    def step(self, text): ...\n")
    Path("held.jsonl").write_text('{"question": "What?"}\n' * 2)
    evaluated = ["eval={source: held.jsonl, split: train, prompts: 2, samples: 2}", "environment={use: 'room.py:Room'}"]
    with pytest.raises(UserError, match=r"eval: environment 'Room': reset: missing .*'answer'"):
        prepare(load_recipe(conversing, evaluated))
