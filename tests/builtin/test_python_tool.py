"""The tool `python`: what the model is told."""

import random
import sys
from collections.abc import Callable

import pytest
from transformers.utils import get_json_schema

from grpo.plugins import find_tool
from grpo.processes.sandbox import runner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is a sandbox on Linux only")
Python: Callable[..., object] = find_tool("python")[1]


def test_what_a_conversation_is_like() -> None:
    tool = Python(seconds=10.0)
    assert tool.python("import math\nx = 3\nprint('hi')\nx * 2") == "hi\n6"
    assert tool.python("y = x") == "[no output]"
    assert tool.python("print(y)") == "3"
    assert tool.python("print(1)\n1/0").startswith("1\nTraceback (most recent call last):\n")
    assert tool.python("import os; os._exit(3)") == (
        "[the interpreter was stopped: it ended: exit code 3. "
        "The next call uses a new one; earlier definitions are lost]"
    )
    assert tool.python("y").endswith("NameError: name 'y' is not defined")
    tool.python("y = 1")
    tool.reset(question="2 + 2?", seed=5)
    assert tool.python("y").endswith("NameError: name 'y' is not defined")
    assert tool.python("import random; random.random()") == str(random.Random(5).random())
    tool.close()


def test_a_long_result_keeps_its_beginning_and_its_end() -> None:
    tool = Python(max_characters=100)
    said = tool.python("print('a' * 10_000)\n'b' * 10")
    assert said == f"{'a' * 50}\n[9,913 characters left out]\n{'a' * 37}\n'{'b' * 10}'"
    assert len(tool.python("print('a' * 99)")) == 99
    tool.close()


def test_its_one_tool_has_a_schema() -> None:
    public = [name for name in vars(Python) if not name.startswith("_")]
    assert public == ["reset", "close", "python"]
    function = get_json_schema(Python.python)["function"]
    assert function["name"] == "python"
    assert "\n" not in function["description"]
    assert function["parameters"]["required"] == ["code"]


def test_without_a_sandbox_it_refuses_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    runner.missing.cache_clear()
    monkeypatch.setattr(runner.sys, "platform", "darwin")
    try:
        with pytest.raises(
            ValueError, match=r"no sandbox: .* not yet on darwin. `kwargs: {unsafe: true}` runs the model's code"
        ):
            Python()
    finally:
        runner.missing.cache_clear()
    tool = Python(unsafe=True)
    assert tool.python("1 + 1") == "2"
    tool.close()
