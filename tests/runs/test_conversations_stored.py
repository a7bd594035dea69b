"""Conversations are stored with their completions, come back as they were, and are shown wherever completions are."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from environments.test_shown import TALK

from grpo.config.log import CompletionsConfig, WandbConfig
from grpo.plugins import find_recipe
from grpo.recipes import load_recipe
from grpo.runs.completions import read_completions, store_completions
from grpo.runs.folder import COMPLETIONS
from grpo.telemetry.console import _sample
from grpo.telemetry.page.browsed import browsed
from grpo.telemetry.page.text import counts
from grpo.telemetry.recorded import RecordedRun
from grpo.telemetry.tensorboard import TensorboardLogger
from grpo.telemetry.weights_and_biases import WandbLogger
from grpo.tools.card import _conversations, _recipe
from grpo.tools.evaluate import EvalOptions, _graded
from grpo.types import BEHAVIOUR, Failure, Group, Rollout, StepMetrics, Task, Trajectory

ROW = Rollout(
    Trajectory((5, 6, 7), (True, False, True), {BEHAVIOUR: (-0.5, 0.0, -1.0)}, "text", "done", 3, TALK),
    scores={"Atlas": 1.5},
    reward=1.5,
    advantage=0.25,
    turn_advantages=(0.5, -0.25),
)
FAILED = replace(
    ROW,
    trajectory=replace(
        ROW.trajectory,
        finish_reason="failed",
        conversation=replace(TALK, messages=(), turn_rewards=(), outcome=None, failure=Failure("timeout", "reset")),
    ),
    scores={"Atlas": None},
    failures={"Atlas": Failure("timeout", "reset")},
    failed=True,
    turn_advantages=None,
    reward=None,
)
PLAIN = Rollout(Trajectory.sampled((5,), (-0.5,), "four", "stop"), scores={"Atlas": None}, reward=0.0)
TASK = Task(3, [{"role": "user", "content": "How far is it?"}], (), {"prompt": "How far is it?"})
GROUP = Group(replace(TASK, columns={"prompt": TASK.prompt}), (ROW, FAILED, PLAIN))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = store_completions(tmp_path, 4, [GROUP], CompletionsConfig(), 0, 1)
    assert path is not None
    return path


def test_what_is_stored_comes_back(stored: Path) -> None:
    _, (group,) = read_completions(stored)
    assert group == GROUP


def test_a_table_s_reader_finds_who_said_what(stored: Path) -> None:
    first, failed, plain = pq.read_table(stored).to_pylist()
    said = json.loads(first["conversation"])
    assert [message["role"] for message in said["messages"]] == ["assistant", "tool", "tool", "assistant", "user"]
    assert "home" not in said
    assert first["prompt"] == "system: Look it up.\n\nuser: How far is it? Ask from Rome."
    assert plain["prompt"] == "user: How far is it?"
    assert (first["turn_advantages"], plain["conversation"], plain["turn_advantages"]) == ([0.5, -0.25], None, None)
    assert json.loads(failed["conversation"])["failure"] == {"kind": "timeout", "error": "reset"}


def test_files_of_earlier_versions_are_read(stored: Path) -> None:
    pq.write_table(pq.read_table(stored).drop_columns(["conversation", "turn_advantages"]), stored)
    _, (group,) = read_completions(stored)
    assert [one.trajectory.conversation for one in group.rollouts] == [None] * 3
    assert group.rollouts[0].trajectory.trained == (True, False, True)


def test_a_secret_that_a_tool_tells_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEATHER_API_KEY", "sesame-open-1234")
    told = replace(TALK, messages=({"role": "tool", "name": "f", "content": "GET /?key=sesame-open-1234"},))
    row = replace(ROW, trajectory=replace(ROW.trajectory, conversation=told))
    path = store_completions(tmp_path, 1, [Group(TASK, (row,))], CompletionsConfig(), 0, 1)
    assert path is not None
    (stored,) = pq.read_table(path).to_pylist()
    assert json.loads(stored["conversation"])["messages"][0]["content"] == "GET /?key=[WEATHER_API_KEY]"


def test_the_report_shows_what_was_said_and_what_was_learned_from(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / COMPLETIONS
    store_completions(folder, 4, [GROUP], CompletionsConfig(), 0, 1, {5: "te", 6: "x", 7: "t"}.get)
    told = browsed(RecordedRun(tmp_path, load_recipe(recipe), [], []))
    first, _, plain = told["rows"]
    assert told["prompts"][first["prompt"]][-1] == ["user", "How far is it? Ask from Rome."]
    assert told["prompts"][plain["prompt"]] == [["user", "How far is it?"]]
    assert [turn["who"] for turn in first["turns"]] == ["model", "search", "now", "model", "user", ""]
    assert first["turns"][0]["calls"] == ['search(query="Rom", k=2)', "now()"]
    assert first["turns"][0]["advantage"] == 0.5
    assert (first["text"], first["characters"], first["trained"]) == ("text", counts([2, 1, 1]), [1, 1, 1])
    assert (first["turn_advantages"], first["columns"]["surprise"]) == ([0.5, -0.25], "LAQ")  # 16 √0.5 and 16 √1
    assert ("turns" in plain, "characters" in plain, plain["text"]) == (False, False, "four")


def test_the_console_and_tensorboard_show_the_best(tmp_path: Path) -> None:
    record = StepMetrics(4, {}, (GROUP,))
    prompt, text = (str(line) for line in _sample(record, 200))
    assert prompt == "prompt How far is it? Ask from Rome."
    assert text.startswith(
        ' 1.500 model: Let me see. → search(query="Rom", k=2) → now() (advantage +0.500) ← search: 5'
    )
    for texts in (True, False):
        logger = TensorboardLogger(tmp_path / str(texts), texts=texts)
        logger.log(record)
        logger.close()
        (file,) = (tmp_path / str(texts) / "tensorboard").iterdir()
        assert (b"    \xe2\x86\x90 now: noon" in file.read_bytes()) == texts


def test_w_and_b_s_table_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb, "Table", lambda columns, data: data)
    monkeypatch.setattr(wandb, "Histogram", lambda values: values)
    logger = object.__new__(WandbLogger)
    logger._cfg = WandbConfig(completions=3)
    first, failed, plain = logger._of_completions(StepMetrics(4, {}, (GROUP,)))["completions"]
    assert first[1:2] + first[3:] == ["How far is it? Ask from Rome.", 1.5, 0.25]
    assert first[2].startswith('model: Let me see.\n→ search(query="Rom", k=2)\n')
    assert failed[2] == "the conversation failed: timeout: reset"
    assert plain[1:3] == ["How far is it?", "four"]


PARTNERS = """
model: {name: some/model}
data: {source: some/data}
environments: {chess: {use: "package.games:Chess"}, cards: {use: "package.games:Cards"}}
tools: [calculator]
optim: {steps: 1}
"""


def test_a_card_says_whom_the_model_talked_to(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(PARTNERS)
    assert _conversations(load_recipe(tmp_path / "mine.yaml")) == [
        "It was trained in multi-turn conversations with the environments `package.games:Chess`, "
        "`package.games:Cards` and the tool `calculator`."
    ]
    assert _conversations(load_recipe(find_recipe("quickstart"))) == []


def test_a_card_names_a_program_without_the_folders_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "play.js").write_text("")
    (tmp_path / "mine.yaml").write_text(
        "model: {name: some/model}\ndata: {source: some/data}\noptim: {steps: 1}\n"
        "environment: {command: [node, play.js, --fast]}\n"
    )
    cfg = load_recipe(tmp_path / "mine.yaml")
    said = "It was trained in multi-turn conversations with the environment `node play.js --fast`."
    assert _conversations(cfg) == [said]
    assert str(tmp_path) not in _recipe(cfg)


def test_a_reward_for_an_evaluation_where_the_environment_s_own_is_the_only_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(PARTNERS)
    cfg = _graded(tmp_path / "mine.yaml", EvalOptions(reward="math_answer"), ["optim.steps=2"])
    assert ([reward.use for reward in cfg.rewards], cfg.optim.steps) == (["math_answer"], 2)
    assert _graded(tmp_path / "mine.yaml", EvalOptions(), []).rewards == ()
