"""Runs whose model is asked by agents: trained, evaluated, told, stopped and resumed, and closed."""

import json
import shutil
import sys
import threading
from pathlib import Path

import pytest
from runs.agents import COMMAND, asking  # noqa: F401
from runs.driver import run, same_end
from runs.test_conversing_runs import gone, trajectories
from runs.test_resume import interrupt_in

from grpo.agents.frontend import Frontend
from grpo.backend.launched import PATIENCE
from grpo.environments import scheduler
from grpo.errors import RunError, UserError
from grpo.recipes import load_recipe
from grpo.runs.completions import read_completions, stored_steps
from grpo.runs.prepare import prepare
from grpo.serving.sessions import SessionRules
from grpo.types import Conversation

ONE = ("output_dir=run", "optim.steps=1")


def metrics(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def told_of(folder: str) -> list[tuple[str, Conversation]]:
    """The conversations of a run, each with its task's source."""
    groups = [group for path in stored_steps(Path(folder) / "completions") for group in read_completions(path)[1]]
    return [(group.task.source, one.trajectory.conversation) for group in groups for one in group.rollouts]


def servers() -> int:
    return sum(thread.name == "agents' server" for thread in threading.enumerate())


@pytest.mark.quick_cases("agent")
@pytest.mark.parametrize("how", ["agent", "command"])
def test_stopped_and_resumed_is_never_stopped(asking: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:  # noqa: F811
    """To the bit, with agents that draw random numbers, in two processes or in one for each rollout."""
    monkeypatch.setattr(scheduler, "GRACE", 600.0)  # on a busy machine too
    more = ["environment.workers=2", "optim.steps=3"] if how == "agent" else [COMMAND, "optim.steps=2"]
    run(asking, *more, "output_dir=whole")
    run(asking, *more, "output_dir=parts", change=interrupt_in(2, "rollout"))
    run(asking, *more, "output_dir=parts", resume=True)
    same_end(Path("whole"), Path("parts"))
    talks = [one.conversation for one in trajectories("whole")]
    assert all(talk.failure is None for talk in talks)
    drawn = [talk.messages[1]["content"] for talk in talks]
    assert len(set(drawn)) > 3
    told = metrics("whole")[0]
    assert 0 <= told["environment/play/drawn"] <= 9
    assert told["rewards/play/mean"] == pytest.approx(told["reward"])
    assert told["reward"] > 0
    assert servers() == 0
    assert how == "command" or gone()


def test_a_program_plays_as_the_function_does(asking: Path) -> None:  # noqa: F811
    """The same rollouts, token for token: draws depend on the run, the row and the sample alone."""
    run(asking, *ONE, "output_dir=function", "environment.agent=play.py:seeded")
    run(asking, *ONE, "output_dir=program", COMMAND)
    one, other = (trajectories(folder) for folder in ("function", "program"))
    assert [rollout.token_ids for rollout in one] == [rollout.token_ids for rollout in other]
    assert [rollout.conversation.outcome for rollout in one] == [rollout.conversation.outcome for rollout in other]


def test_agents_by_the_column_environment(asking: Path) -> None:  # noqa: F811
    rows = [{"question": f"{n}?", "answer": "2", "environment": name} for n, name in enumerate(["a", "b"] * 2)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("toy.yaml").write_text(Path("toy.yaml").read_text().replace("environment:", "environments: {}\n#"))
    two = "environments={a: {agent: 'play.py:run', workers: 1}, b: {agent: 'play.py:once', workers: 1, weight: 2}}"
    run(asking, *ONE, two, "data.shuffle=false")
    talks = [one.conversation for one in trajectories("run")]
    assert [talk.environment for talk in talks] == ["play"] * 3 + ["once"] * 3
    assert [talk.outcome < 0 for talk in talks] == [False] * 3 + [True] * 3


def test_what_agents_fail_on_is_told_and_leaves_the_baseline(asking: Path) -> None:  # noqa: F811
    run(asking, *ONE, "environment.agent=play.py:fails", "data.shuffle=false", "environment.max_failure_rate=1")
    failed = [one.conversation.failure for one in trajectories("run")]
    assert [failure and failure.kind for failure in failed] == ["error"] * 3 + [None] * 3
    assert "ValueError: no luck" in str(failed[0])
    assert "play.py:" in str(failed[0])
    assert metrics("run")[0]["rewards/fails/error_rate"] == 0.5


def test_agents_that_ask_nothing_end_the_run_with_the_reason(asking: Path) -> None:  # noqa: F811
    with pytest.raises(RunError, match="it got no answer from the model: it must call the model with the base_url"):
        run(asking, *ONE, "environment.agent=play.py:idle")
    assert servers() == 0


def test_a_dry_run_an_evaluation_and_a_rollout_told(asking: Path, run_cli) -> None:  # noqa: F811
    dry = run_cli("train", asking, "--dry-run")
    assert (dry.code, dry.err) == (0, "")
    assert "environment play: an agent; it calls the model itself and returns the reward" in dry.out
    assert "planned for data.max_prompt_length (1,024 tokens), because agents write their own prompts" in dry.out
    ended = run_cli("train", asking, *ONE, "eval={split: train, prompts: 2, samples: 2}")
    assert ended.code == 0, ended.err
    assert "try it   grpo generate run --row 0\n" in ended.out
    measured = run_cli("eval", "run")
    assert measured.code == 0, measured.err
    assert "held-out accuracy by play, n=2" in measured.out
    told = run_cli("generate", "run", "--row", "2")
    assert told.code == 0, told.err
    prompt, *lines, last = told.out.splitlines()
    assert prompt == "prompt: What is 3+3?"
    assert [line.partition(": ")[0] for line in lines if line.startswith(("model", "←"))][:3] == [
        "model",
        "← user",
        "model",
    ]
    assert "rewarded" in last
    given = run_cli("generate", "run", '{"question": "Well?", "answer": "1"}')
    assert given.out.startswith("prompt: Well?\n")
    assert servers() == 0


def test_agents_that_return_nothing_are_told_to(asking: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    run(asking, *ONE, "environment.agent=play.py:nothing")
    assert "nothing rewarded no conversation: the agent returned None in 6 of 6. Let it return a number" in caplog.text


def test_a_rollout_that_fails_when_told_is_an_error(asking: Path, run_cli) -> None:  # noqa: F811
    fails = "environment={agent: 'play.py:fails', workers: 1, max_failure_rate: 1}"
    ended = run_cli("train", asking, *ONE, fails, "data.shuffle=false")
    assert "agent 'fails' failed in 3 conversations" in ended.out
    told = run_cli("generate", "run", "--row", "0")
    assert told.code == 1
    assert "the conversation failed: error: ValueError: no luck" in told.out
    assert told.err.endswith("grpo: the conversation failed: see above.\n")


def test_a_prompt_alone_lacks_columns_and_a_row_has_them(asking: Path, run_cli) -> None:  # noqa: F811
    """A program reads what it likes, so that what it lacks is found out when it runs."""
    code = Path("play.py").read_text().replace('row["question"]', '(row["answer"] and row["question"])')
    Path("play.py").write_text(code)
    run(asking, *ONE, COMMAND)
    alone = run_cli("generate", "run", "Well?")
    assert alone.code == 1
    assert "A prompt alone fills only the column 'question'" in alone.err
    assert "(--row 0)" in alone.err
    assert run_cli("generate", "run", "--row", "0").code == 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("environment.agent=play.py:gone", "no function 'gone' in it"),
        ("environment.agent=nowhere.py:run", "there is no file nowhere.py"),
        ("environment={command: [no-such-program]}", "agent 'no-such-program': command: there is no program"),
        ("environment.kwargs={turn: 1}", "grpo: agent 'play': kwargs.turn: run has no such argument"),
        ("environment.env=[NO_SUCH_KEY]", "agent 'play': env: the environment has no variable NO_SUCH_KEY"),
        ("data.source=asked.jsonl", "agent 'play': run: missing a required argument: 'question'"),
        ("rewards=[{use: 'grades.py:at_home'}]", "takes `environments`, but an agent has no environment object"),
    ],
)
def test_a_dry_run_finds_what_does_not_fit(asking: Path, run_cli, override: str, said: str) -> None:  # noqa: F811
    Path("grades.py").write_text("def at_home(completions, environments, **_):\n    return [0.0] * len(completions)\n")
    Path("asked.jsonl").write_text('{"asked": "What?", "answer": "2"}\n')
    more = ["data.prompt=asked"] if "asked" in override else []
    refused = run_cli("train", asking, "--dry-run", override, *more)
    assert refused.code == 2
    assert said in refused.err


def test_the_extra_is_asked_for_before_anything_is_loaded(asking: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(UserError, match=r"environment.agent needs starlette.*pip install -e '.*\[serve\]'"):
        prepare(load_recipe(asking, ["model.name=nowhere/at-all"]))


def test_rows_need_no_prompts_and_each_may_be_as_long_as_the_recipe_says(asking: Path) -> None:  # noqa: F811
    """The plan has room for prompts that agents write: all of a prompt may be a row's own."""
    asking.write_text(asking.read_text().replace(", prompt: question", ", max_prompt_length: 77"))
    prepared = prepare(load_recipe(asking))
    with prepared.opened:
        assert prepared.tasks[0].prompt == [{"role": "user", "content": ""}]
        load = prepared.planner.load
        assert (load.prompt_length, load.own, load.waits) == (77, 77, True)
        assert prepared.trainer.ranks.patience == PATIENCE + 3600.0  # an agent may take an hour, as may those of others


def test_the_limits_and_the_template_of_each_source(asking: Path) -> None:  # noqa: F811
    """First prompts may be as long as their own source says; the longest by any source is what the endpoint tells."""
    with Path("play.py").open("a") as file:
        file.write("\ndef long(base_url, api_key, question):\n")
        file.write("    ask(base_url, api_key, [{'role': 'user', 'content': question * 60}])\n    return 1.0\n")
    Path("more.jsonl").write_text(Path("train.jsonl").read_text())
    sources = "data={prompt: question, sources: [{source: train.jsonl, max_prompt_length: 40}, {source: more.jsonl}]}"
    run(asking, *ONE, sources, "environment={agent: 'play.py:long', workers: 1, max_failure_rate: 1}")
    ended = {(name, talk.failure is None) for name, talk in told_of("run")}
    assert ended == {("train", False), ("more", True)}


def test_arguments_of_the_chat_template_are_the_recipes(asking: Path) -> None:  # noqa: F811
    config = Path("model/tokenizer_config.json")
    shutil.copytree(load_recipe(asking).model.name, "model")
    template = json.loads(config.read_text())
    config.write_text(json.dumps({**template, "chat_template": template["chat_template"] + "{{ tone }}"}))
    prepared = prepare(
        load_recipe(
            asking, ["model.name=model", "environment.agent=play.py:once", "data.chat_template_kwargs={tone: rude}"]
        )
    )
    with prepared.opened:
        engine = prepared.trainer.engine
        (group,) = engine.rollout(prepared.tasks[:1], 2, 1.0, [7])
        assert engine.generator.tokenizer.decode(list(group.task.prompt_ids)).endswith("rude")


def test_sessions_are_ruled_as_the_recipe_says(asking: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    ruled: list[SessionRules] = []
    opened = Frontend.open
    monkeypatch.setattr(Frontend, "open", lambda self, inbox, rules: ruled.append(rules) or opened(self, inbox, rules))
    for thinking in ("drop", "keep"):
        more = [f"environment.thinking={thinking}", "rollout.top_k=5", "rollout.temperature=0.5"]
        prepared = prepare(load_recipe(asking, [*more, "loss.importance_sampling_correction=token_mask"]))
        with prepared.opened:
            prepared.trainer.engine.rollout(prepared.tasks[:1], 1, 0.7, [7])  # as an evaluation may
    assert [rules.keep_thinking for rules in ruled] == [False, True]
    assert {(rules.recipe.temperature, rules.sampling.temperature, rules.recipe.top_k) for rules in ruled} == {
        (0.5, 0.7, 5)
    }


def test_kwargs_and_metrics_alone(asking: Path) -> None:  # noqa: F811
    """Rewards of functions read what was said; the agent's own may weigh nothing."""
    Path("grades.py").write_text("def turns(completions, **_):\n    return [float(len(c)) for c in completions]\n")
    run(asking, *ONE, "environment.kwargs={turns: 3}", "environment.weight=0", "rewards=[{use: 'grades.py:turns'}]")
    told = metrics("run")[0]
    assert told["reward"] == told["rewards/turns/mean"] == 5.0  # three answers, and two questions in between
    assert "rewards/play/mean" in told
    assert told["turns/mean"] == 3.0


def test_a_system_message_reaches_the_agent_in_its_prompt(asking: Path) -> None:  # noqa: F811
    with Path("play.py").open("a") as file:
        file.write(
            "\ndef asks(base_url, api_key, prompt):\n    ask(base_url, api_key, prompt)\n    return len(prompt)\n"
        )
    run(asking, *ONE, "environment.agent=play.py:asks", "data.system=Be brief.")
    (first, *_) = trajectories("run")
    assert [message["role"] for message in first.conversation.prompt] == ["system", "user"]
    assert first.conversation.outcome == 2.0
