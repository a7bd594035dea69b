"""The students' chat template, and conversations as it writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from grpo.builtin.exercise import Exercise
from grpo.types import Message

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_SAID = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
_NEXT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_PLAIN = "{% for message in messages %}" + _SAID + "{% endfor %}" + _NEXT
_WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools:' }}{% for tool in tools %}"
    "{{ ' ' + tool.function.name + '(' + tool.function.parameters.properties | join(', ') + ')' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if message.tool_calls %}"
    "{{ '<|im_start|>assistant\n' + message['content'] }}"
    "{% for tool_call in message.tool_calls %}{% set tool_call = tool_call.function %}"
    '{{ \'<tool_call>\n{"name": "\' + tool_call.name + \'", "arguments": \' }}'
    "{{ tool_call.arguments | tojson }}{{ '}\n</tool_call>' }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}" + _SAID + "{% endif %}{% endfor %}" + _NEXT
)
"""Tools by name and parameters alone, calls as Qwen writes them."""
_BY_THE_MODEL = re.compile(f"(?<={re.escape(START)}assistant\n)(.*?{re.escape(END)})", re.DOTALL)


def template(task: Exercise) -> str:
    """The Jinja template of a task's student."""
    return _WITH_TOOLS if task.all_tools else _PLAIN


def parts(task: Exercise, messages: Sequence[Message]) -> list[str]:
    """A conversation's text in parts: what the model reads, what it says, with the end of its turn, what it reads …"""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered = render_jinja_template([list(messages)], tools=_schemas(task), chat_template=template(task))[0]
    return _BY_THE_MODEL.split(rendered[0])[:-1]  # what follows the last turn is nobody's


@cache
def _schemas(task: Exercise) -> list[dict[Any, Any] | Callable[..., Any]] | None:
    from transformers.utils.chat_template_utils import get_json_schema

    return [get_json_schema(tool) for tool in task.all_tools.values()] or None
