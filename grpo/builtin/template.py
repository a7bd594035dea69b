"""The chat template of the students, and conversations rendered with it."""

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
"""Lists tools by name and parameters only, and writes calls in Qwen's format."""
_BY_THE_MODEL = re.compile(f"(?<={re.escape(START)}assistant\n)(.*?{re.escape(END)})", re.DOTALL)


def template(task: Exercise) -> str:
    """Return the Jinja template of a task's student."""
    return _WITH_TOOLS if task.all_tools else _PLAIN


def parts(task: Exercise, messages: Sequence[Message]) -> list[str]:
    """Split a conversation's text into parts: alternately text that the model reads and turns of the model, with their
    ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered = render_jinja_template([list(messages)], tools=_schemas(task), chat_template=template(task))[0]
    return _BY_THE_MODEL.split(rendered[0])[:-1]  # drop the text after the last turn


@cache
def _schemas(task: Exercise) -> list[dict[Any, Any] | Callable[..., Any]] | None:
    from transformers.utils.chat_template_utils import get_json_schema

    return [get_json_schema(tool) for tool in task.all_tools.values()] or None
