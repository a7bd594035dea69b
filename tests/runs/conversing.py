"""A toy run in conversations: its recipe, an environment and tools that draw, and a model that always calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from grpo.environments.chat import Chat

TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool.function.name }} {% endfor %}
{{- '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
ROOM = '''
import os, random
import numpy as np
import helper

open("processes", "a").write(f"{os.getpid()} ")

class Room:
    def __init__(self, sides=9):
        self.sides = sides
    def reset(self, **row):
        open("resets", "a").write("x")
        self.sum = random.randint(1, self.sides)
        return f" Begin with {self.sum}."
    async def draw(self, most: int) -> str:
        """
        Draws a number.

        Args:
            most: The largest.
        """
        number = random.randint(0, most) + int(np.random.randint(10))
        self.sum += number
        return str(number)
    def get_reward(self):
        return self.sum / 10
'''


REWARD = """
def reward(completions, prompts, **columns):
    return [len(messages) / 8 for messages in completions]
"""


def calls_draw(_: Chat, turn_ids: Any) -> dict[str, Any]:
    """A turn as the assistant's message: it calls the tool `draw`, whatever it says."""
    function = {"name": "draw", "arguments": {"most": len(turn_ids)}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def calls_first_tool(chat: Chat, turn_ids: Any) -> dict[str, Any]:
    """A turn as the assistant's message: it calls the first tool, if there are tools, whatever it says."""
    message = {"role": "assistant", "content": chat._template.tokenizer.decode(list(turn_ids))}
    if not chat._template.tools:
        return message
    told = chat._template.tools[0]["function"]
    function = {"name": told["name"], "arguments": dict.fromkeys(told["parameters"]["required"], "1")}
    return {**message, "tool_calls": [{"type": "function", "function": function}]}


def talker(toy_folder: Path, folder: Path) -> None:
    """The toy model with a chat template that tells it of tools."""
    shutil.copytree(toy_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))


DROPPING = """
{%- set asked = namespace(last=-1) %}{% for message in messages %}
{%- if message.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content and loop.index0 > asked.last %}{{ message.reasoning_content }}{% endif %}
{{- message.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\nhm' }}{% endif %}
"""


def thinks(chat: Chat, turn_ids: Any) -> dict[str, Any]:
    """A turn as the assistant's message: the first half is thinking."""
    ids, decode = list(turn_ids), chat._template.tokenizer.decode
    half = len(ids) // 2
    said = {"reasoning_content": decode(ids[:half]), "content": decode(ids[half:], skip_special_tokens=True)}
    return {"role": "assistant", **said}


def thinker(toy_folder: Path, folder: Path) -> None:
    """The toy model with a chat template that drops earlier thinking when a user's message follows."""
    talker(toy_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": DROPPING}))


@pytest.fixture
def conversing(recipe: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of four steps over four questions, with the working directory in a fresh folder."""
    talker(toy_folder, Path("talker"))
    Path("helper.py").write_text("")
    Path("room.py").write_text(ROOM)
    Path("digits.py").write_text(REWARD)
    monkeypatch.setattr(Chat, "parse", calls_draw)
    recipe.write_text(
        recipe.read_text()
        .replace(str(toy_folder), "talker")
        .replace("max_completion_length: 8", "max_completion_length: 64")
        .replace("steps: 2", "steps: 4")
        + 'environment: {use: "room.py:Room", max_turns: 3, workers: 1}\n'
    )
    return recipe
