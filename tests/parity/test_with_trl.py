"""An environment, tools and rewards that were written for TRL, under both trainers: the same answers of a model lead to
the same prompts, tokens, masks, messages, rewards and metrics.

It runs where TRL is installed: beside this project, or in an environment of its own whose Python `TRL_PYTHON` names.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from environments.scripted import Scripted, Session

from grpo.data.prompts import PromptRenderer
from grpo.data.stream import first_tasks
from grpo.model.mlxlm import load_tokenizer
from grpo.recipes import recipe_of
from grpo.rollout import RolloutEngine, sampling_of
from grpo.runs.given import Given
from grpo.runs.partners import invite
from grpo.scoring.scorer import Scorer

HERE = Path(__file__).parent
PYTHON = os.environ.get("TRL_PYTHON") or (sys.executable if importlib.util.find_spec("trl") else None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PYTHON is None, reason="TRL is not installed (TRL_PYTHON names it)")]


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


SCRIPT = [  # the environment, and what the model says by turns
    ("game", [call("move", direction="left"), call("move", direction="up"), "Enough."]),
    ("game", [call("move", direction="sideways"), "A pity."]),  # raises
    ("game", [*[call("move", direction=way) for way in ("left", "down", "right", "up")], "Over."]),  # game over
    ("game", [call("fly"), call("move"), call("add", a=1, b=2), call("add", a=1), "Done."]),  # unknown, incomplete
    ("game", ["<tool_call>\n{nonsense\n</tool_call>"]),  # no call
    ("game", [f"First.\n{call('undo', steps=2)}", "Asynchronous."]),
    ("diary", [f"{call('note', text='one')}\n{call('note', text='two', stars=3)}", "Written."]),
    ("diary", [call("columns"), "Read."]),
    ("diary", ["Nothing to say."]),
    ("diary", [call("page"), "Seen."]),  # the rows from here on: see the deviations below
    ("diary", [call("note", text="one"), call("words"), "Known."]),
    ("diary", [call("note", text="one")] * 9),
]
PAGE, WORDS, LIMIT = range(len(SCRIPT) - 3, len(SCRIPT))
ROWS = [
    {
        "prompt": [{"role": "system", "content": "Play."}, {"role": "user", "content": f"Game {i}"}],
        "environment": name,
        "board_seed": i,
        "wanted": ["one", "three"],
    }
    for i, (name, _) in enumerate(SCRIPT)
]
ITERATIONS = 6
MOST = 4000


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What TRL tells."""
    into = tmp_path_factory.mktemp("trl")
    script = {
        "rows": ROWS,
        "turns": [turns for _, turns in SCRIPT],
        "max_completion_length": MOST,
        "max_tool_calling_iterations": ITERATIONS,
    }
    (into / "script.json").write_text(json.dumps(script))
    ran = subprocess.run([PYTHON, HERE / "with_trl.py", into], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads((into / "told.json").read_text()) | {"tokenizer": into / "tokenizer"}


class _Turns(Session):
    """Says what is written for a row, by turns."""

    def admit(self, slots, rows) -> None:
        for slot, row in zip(slots, rows, strict=True):
            turn = len(row.injected) - bool(row.opening)
            self.left[slot] = iter(self.script[row.prompt.ids][turn][len(row.turn) :])
            self.fed[slot] = len(row.token_ids)


@pytest.fixture(scope="module")
def here(trl) -> dict:
    """What this project tells, by the recipe's own wiring."""
    file = HERE / "game2048.py"
    terms = {"workers": 1, "max_turns": ITERATIONS + 1}
    cfg = recipe_of(
        {
            "model": {"name": "builtin:arithmetic-student"},
            "data": {"source": "rows.jsonl", "prompt": "prompt", "max_prompt_length": MOST},
            "environments": {"game": {"use": f"{file}:Game2048", **terms}, "diary": {"use": f"{file}:Diary", **terms}},
            "tools": [f"{file}:add"],
            "rewards": [{"use": f"{file}:written"}, {"use": f"{file}:turns"}],
            "rollout": {"max_completion_length": MOST},
            "optim": {"steps": 1},
        },
        "the recipe",
    )
    tokenizer = load_tokenizer(trl["tokenizer"])
    partners = invite(cfg.conversations, cfg.tools, Given(), 2)
    schemas = partners.tools
    try:
        renderer = PromptRenderer(cfg.data, tokenizer, tools=partners.tools, supplied=partners.resets)
        scorer = Scorer.of(cfg.rewards, hosts=list(partners.hosts.values()))
        tasks = first_tasks(ROWS, renderer, len(ROWS))
        environment, _ = partners.environment(tokenizer, renderer, tasks[0], cfg.rollout, 0, scorer.lends_environments)
        engine = RolloutEngine(_generator(tokenizer, trl["prompt_ids"]), sampling_of(cfg.rollout), environment)
        with scorer.open(tasks) as scoring:
            groups = engine.rollout(tasks, 1, 1.0, mx.random.key(0), whole=scoring.add)
            rollouts = [rollout for group in scorer.score(groups, scoring) for rollout in group.rollouts]
        scorer.close()
    finally:
        partners.close()
    talks = [rollout.trajectory.conversation for rollout in rollouts]
    calls, failed = sum(talk.calls for talk in talks), sum(talk.failed_calls for talk in talks)
    return {
        "prompts": [list(talk.prompt) for talk in talks],
        "completions": [list(talk.messages) for talk in talks],
        "completion_ids": [list(rollout.trajectory.token_ids) for rollout in rollouts],
        "mask": [[int(one) for one in rollout.trajectory.trained] for rollout in rollouts],
        "rewards": {name: [rollout.scores[name] for rollout in rollouts] for name in scorer.weights},
        "metrics": {"tools/call_frequency": calls / len(rollouts), "tools/failure_frequency": failed / calls},
        "schemas": {name: list(tools) for name, tools in schemas.items()},
    }


def _generator(tokenizer, prompts: list[list[int]]) -> Scripted:
    """Says the script after TRL's prompts: after other ones it has nothing to say."""
    turns = [[tokenizer.encode(turn + "<|im_end|>", add_special_tokens=False) for turn in one] for _, one in SCRIPT]
    script = {tuple(prompt): said for prompt, said in zip(prompts, turns, strict=True)}
    generator, size = Scripted({}), len(tokenizer)
    generator.tokenizer = tokenizer
    generator.decoding.vocabulary = size
    generator.decoding.open = lambda slots: _Turns(script, slots, size)
    generator.stops = frozenset({tokenizer.eos_token_id})
    return generator


def test_both_list_the_same_tools(trl, here) -> None:
    assert here["schemas"] == trl["schemas"]


@pytest.mark.parametrize("what", ["prompts", "completions", "completion_ids", "mask"])
def test_conversations_are_the_same(trl, here, what: str) -> None:
    assert here[what][:PAGE] == trl[what][:PAGE]


def test_rewards_are_the_same(trl, here) -> None:
    assert here["rewards"] == {**trl["rewards"], "Diary": [None] * len(SCRIPT)}, "its steps could have given rewards"
    assert trl["rewards"]["Game2048"][0] == 1.0, "two tiles were merged"


def test_calls_are_counted_alike(trl, here) -> None:
    """But for the one that TRL does not run."""
    n = len(SCRIPT)
    calls, failed = n * trl["metrics"]["tools/call_frequency"], 4
    assert here["metrics"]["tools/call_frequency"] == pytest.approx((calls + 1) / n)
    assert here["metrics"]["tools/failure_frequency"] == pytest.approx(failed / (calls + 1))
    assert trl["metrics"]["tools/failure_frequency"] == pytest.approx(failed / calls)


def test_deviation_content_blocks_reach_a_text_model_as_their_text(trl, here) -> None:
    """TRL's trainer lets the template write the list, as Python shows it."""
    assert here["completions"][PAGE] == trl["completions"][PAGE]
    tokenizer = load_tokenizer(trl["tokenizer"])
    assert "<tool_response>\n0 notes\n</tool_response>" in tokenizer.decode(here["completion_ids"][PAGE])
    assert "[{'type': 'text', 'text': '0 notes'}]" in tokenizer.decode(trl["completion_ids"][PAGE])


def test_deviation_a_list_of_anything_else_is_a_text(trl, here) -> None:
    """TRL takes any list for content blocks; the model reads the same."""
    assert trl["completions"][WORDS][3]["content"] == ["one"]
    assert here["completions"][WORDS][3]["content"] == "['one']"
    assert here["completion_ids"][WORDS] == trl["completion_ids"][WORDS]


def test_deviation_what_the_last_turn_calls_is_run(trl, here) -> None:
    """TRL ends with the calls of the last turn unanswered."""
    *before, last = here["completions"][LIMIT]
    assert before == trl["completions"][LIMIT]
    assert last == {"role": "tool", "name": "note", "content": f"note {ITERATIONS + 1}"}
    assert here["completion_ids"][LIMIT] == trl["completion_ids"][LIMIT]
