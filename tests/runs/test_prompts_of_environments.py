"""Prompts that environments supply, or add to: rows without any, and a plan that has room for what is added."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from runs.conversing import conversing  # noqa: F401

from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare

ROWS = '{"question": "What is 1+1?"}\n{"question": "What is 2+2?"}\n'


def test_rows_without_prompts(conversing: Path, run_cli) -> None:  # noqa: F811
    """They are planned for at their longest, and each completion may have one of its own."""
    Path("train.jsonl").write_text(ROWS)
    conversing.write_text(conversing.read_text().replace(', prompt: "{question}"', ", max_prompt_length: 200"))
    ran = run_cli("train", conversing, "--dry-run")
    assert ran.code == 0, ran.err
    said = " ".join((ran.out + ran.err).split())
    assert f"8 completions, at most {8 * (200 + 64):,} tokens" in said
    assert "; planned for data.max_prompt_length (200 tokens), because an environment's reset may lengthen them" in said


@pytest.mark.parametrize(
    ("reset", "said"),
    [
        (
            "raise KeyError('hats')",
            r"environment 'Room' \(.*room\.py:Room\): reset failed for row 0 of data: KeyError",
        ),
        ("raise KeyError('hats')", r"room\.py:2\)"),
        ("return 3", "reset failed for row 0 of data: reset returned 3: return None, text"),
        (
            "return None",
            r"data\.prompt: the rows have no column 'prompt' \(they have question\), and the reset of envir",
        ),
        ("return ' '", "returns no prompt either"),
    ],
)
def test_reset_is_tried_on_the_first_row_before_the_first_step(conversing: Path, reset: str, said: str) -> None:  # noqa: F811
    Path("train.jsonl").write_text(ROWS)
    Path("room.py").write_text(f"class Room:\n    def reset(self, **row): {reset}\n    def step(self, text): ...\n")
    conversing.write_text(conversing.read_text().replace(', prompt: "{question}"', ""))
    with pytest.raises(UserError, match=said):
        prepare(load_recipe(conversing, []))


def test_a_tool_whose_reset_fails_on_the_first_row_is_named(conversing: Path) -> None:  # noqa: F811
    Path("room.py").write_text("class Room:\n    def reset(self, **row): ...\n    def step(self, text): ...\n")
    Path("lost.py").write_text(
        "class Lost:\n    def reset(self, **row): raise KeyError('x')\n    def go(self) -> str:\n        'Goes.'\n"
    )
    with pytest.raises(UserError, match=r"^tools\.0: reset: KeyError: 'x' \(.*lost\.py:2\), with row 0 of data$"):
        prepare(load_recipe(conversing, ["environment={use: 'room.py:Room'}", "tools=['lost.py:Lost']"]))


def test_a_prompt_that_the_data_leaves_empty_is_the_data_s_own(conversing: Path) -> None:  # noqa: F811
    Path("train.jsonl").write_text('{"prompt": ""}\n' * 2)
    Path("room.py").write_text("class Room:\n    def reset(self, **row): ...\n    def step(self, text): ...\n")
    conversing.write_text(conversing.read_text().replace(', prompt: "{question}"', ""))
    prepare(load_recipe(conversing, ["environment={use: 'room.py:Room'}"])).opened.close()


def test_reset_is_tried_once_and_may_add_nothing_to_a_prompt(conversing: Path) -> None:  # noqa: F811
    room = (
        "class Room:\n    def reset(self, **row): open('rows', 'a').write(f'{row}\\n')\n    def step(self, text): ...\n"
    )
    Path("room.py").write_text(room)
    prepared = prepare(load_recipe(conversing, ["environment={use: 'room.py:Room'}"]))
    prepared.opened.close()
    (row,) = Path("rows").read_text().splitlines()
    assert row == str({"prompt": prepared.tasks[0].prompt, **prepared.tasks[0].columns})


SOURCES = """{sources: [
  {name: brief, source: train.jsonl, prompt: "{question}", system: Be brief., max_prompt_length: 90},
  {name: plain, source: train.jsonl, prompt: "{question}", max_prompt_length: 300}]}"""


def test_conversations_of_each_source_begin_with_its_system_message_and_limit(conversing: Path) -> None:  # noqa: F811
    Path("train.jsonl").write_text(ROWS)
    room = Path("room.py").read_text()
    Path("room.py").write_text(room.replace('f" Begin with {self.sum}."', '"x" * 99'))
    text = conversing.read_text().replace('{source: train.jsonl, prompt: "{question}"}', SOURCES)
    conversing.write_text(text)
    run = prepare(load_recipe(conversing, ["rollout.prompts_per_step=8"]))
    with closing(run.opened):
        groups = run.trainer.step(1).groups
    begun = {group.task.source: group.rollouts[0].trajectory.conversation for group in groups}
    assert [message["role"] for message in begun["plain"].prompt] == ["user"]
    assert [message["role"] for message in begun["brief"].prompt] == ["system", "user"]
    assert begun["plain"].failure is None
    assert "90" in begun["brief"].failure.error
    conversing.write_text(text.replace("max_prompt_length: 300", "chat_template_kwargs: {a: 1}"))
    with pytest.raises(UserError, match=r"'brief' and 'plain' differ in chat_template_kwargs, but all conversations"):
        prepare(load_recipe(conversing, []))
