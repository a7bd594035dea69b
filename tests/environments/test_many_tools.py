"""What finding out how calls are written costs with many tools."""

from __future__ import annotations

from typing import Any

import pytest
from environments.families import tokenizer_of

from grpo.environments import template as template_module
from grpo.environments.readback import format_of
from grpo.environments.template import Template
from grpo.errors import UserError


def tools(number: int) -> list[dict[str, Any]]:
    kinds = ("string", "integer", "number", "boolean", "array", "object")
    functions = [
        {
            "name": f"tool{place}",
            "description": "Does.",
            "parameters": {"type": "object", "properties": {"x": {"type": kinds[place % 6]}}},
        }
        for place in range(number)
    ]
    return [{"type": "function", "function": function} for function in functions]


@pytest.mark.parametrize("family", ["qwen2.5", "gpt-oss", "glm-4"])
def test_the_cost_grows_with_the_number_of_tools_and_not_with_its_square(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    rendered = template_module.rendered_text

    def counted(tokenizer: Any, messages: Any, tools: Any, *rest: Any) -> str:
        shown.append(len(tools))
        return rendered(tokenizer, messages, tools, *rest)

    monkeypatch.setattr(template_module, "rendered_text", counted)
    tokenizer = tokenizer_of(family)
    costs = []
    for number in (8, 32):
        shown.clear()
        assert format_of(Template(tokenizer, tools(number), {}, tokenizer.eos_token_ids), None) is not None
        costs.append(sum(shown))
    assert costs[1] < 5 * costs[0]


def test_a_tool_whose_call_is_not_read_back_is_found_wherever_it_stands() -> None:
    tokenizer = tokenizer_of("gpt-oss")
    odd = tools(3)
    odd[2]["function"]["name"] = "a b"  # it reads a name until the blank
    for given in (odd, odd[::-1]):
        with pytest.raises(UserError, match="reads back"):
            format_of(Template(tokenizer, given, {}, tokenizer.eos_token_ids), None)
