"""A mistake in an entry of `tools` is said of that entry, and not of the environment beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from environments.looking import LOOK

from grpo.config import EnvironmentConfig, ToolConfig
from grpo.environments.host import EnvironmentHost
from grpo.environments.making import make_host
from grpo.errors import UserError
from grpo.plugins import locate_tool

CODE = '''
class Room:
    def look(self, query: str) -> str:
        """
        Looks something up.

        Args:
            query: What.
        """
        return query

class Fails:
    def __init__(self, kind="value"):
        if kind == "exit":
            raise SystemExit("no")
        raise ValueError("no key is given")
    def go(self) -> str:
        """Goes."""

class Keyed:
    def __init__(self, key): ...
    def go(self) -> str:
        """Goes."""

class Lost:
    def reset(self, **row):
        raise RuntimeError("no such place")
    def go(self) -> str:
        """Goes."""

class Empty:
    def reset(self, **row): ...
'''


@pytest.fixture(autouse=True)
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rooms.py").write_text(CODE + LOOK)


@pytest.fixture(params=["in a process", "in this process"])
def host(request: pytest.FixtureRequest):
    """Makes a host of the environment, a calculator and a tool, in a process or from objects."""
    made: list[EnvironmentHost] = []

    def make(tool: str, environment: str | None = "Room", **kwargs: object) -> EnvironmentHost:
        use = environment and f"rooms.py:{environment}"
        tools = [ToolConfig(use="calculator"), ToolConfig(use=f"rooms.py:{tool}", kwargs=kwargs)]
        functions = [] if request.param == "in a process" else [locate_tool(one.use).load() for one in tools]
        made.append(make_host(EnvironmentConfig(use=use, workers=1), tools, functions=functions))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(
    ("tool", "kwargs", "said"),
    [
        ("Fails", {}, "tools.1: cannot be created: ValueError: no key is given (FILE:16)"),
        ("Fails", {"kind": "exit"}, "tools.1: cannot be created: SystemExit: no (FILE:15)"),
        (
            "Keyed",
            {},
            "tools.1: cannot be created: Keyed.__init__() missing 1 required positional argument: 'key' (FILE:20): it "
            "is called with the arguments in the recipe's `kwargs`",
        ),
        ("Empty", {}, "tools.1: Empty (FILE:31) has no public method for the model to call"),
        ("look", {"limit": 1}, "tools.1.kwargs: look (FILE:34) got an unexpected keyword argument 'limit'"),
        (
            "look",
            {},
            "tools.1: two tools are named 'look', one in this entry and one in the environment (Room). The model "
            "could not tell them apart: rename one of them",
        ),
    ],
)
def test_it_is_said_before_the_run(host, tool: str, kwargs: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as refused:
        _ = host(tool, **kwargs).description
    assert re.sub(r"\([^()]*rooms\.py:", "(FILE:", str(refused.value)) == said


def test_without_an_environment_nothing_clashes(host) -> None:
    assert [tool["function"]["name"] for tool in host("look", None).description.tools] == ["calculator", "look"]


def test_a_reset_that_fails_is_the_tool_s(host) -> None:
    (seat,) = host("Lost").seats(0, 1)
    reply = seat.reset({"prompt": "?"}, 0).result()
    assert reply.kind == "error"
    assert re.fullmatch(r"tools\.1: reset: RuntimeError: no such place \(.*rooms\.py:27\)", reply.error)


def test_two_entries_of_one_name() -> None:
    tools = [ToolConfig(use="rooms.py:look"), ToolConfig(use="rooms.py:look")]
    host = make_host(EnvironmentConfig(workers=1), tools)
    try:
        with pytest.raises(UserError, match=r"^tools\.1: two tools are named 'look', one in this entry and one in to"):
            _ = host.description
    finally:
        host.close()
