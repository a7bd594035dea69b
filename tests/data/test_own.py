"""A sampler of the user's own: its mistakes are told as theirs."""

import re

import pytest

from grpo.data.own import OwnSource
from grpo.data.source import METHODS, checked_source, taken
from grpo.errors import RunError, UserError

CLASS = """
class Mine:
    def __init__(self, stream):
        self.stream = stream

    def take(self, n):
        return self.stream.take(n)

    def observe(self, groups):
        self.groups = groups

    def metrics(self):
        return {"mine": 1.0}

    def state(self):
        return {"seen": [1]}

    def load_state(self, state):
        self.loaded = state
"""


class Stream:
    def take(self, n):
        return [None] * n


def own(text: str = CLASS) -> OwnSource:
    names: dict = {}
    exec(compile(text, "/somewhere/mine.py", "exec"), names)
    return OwnSource(names["Mine"](Stream()), "data.sampler 'mine.py:Mine'")


def test_it_does_what_the_class_does() -> None:
    source = checked_source(own())
    assert source.take(2) == [None, None]
    assert (source.metrics(), source.state()) == ({"mine": 1.0}, {"seen": [1]})
    source.observe(["group"])
    source.load_state({"seen": [2]})
    assert (source._source.groups, source._source.loaded) == (["group"], {"seen": [2]})


@pytest.mark.parametrize("method", METHODS)
def test_what_it_raises_is_one_line_with_the_place(method: str) -> None:
    first = next(line for line in CLASS.splitlines() if f"def {method}(" in line)
    source = own(CLASS.replace(first, f"{first}\n        raise KeyError('answer')"))
    arguments = {"take": [3], "observe": [[]], "load_state": [{}]}.get(method, [])
    line = CLASS.splitlines().index(first) + 2
    place = rf"\(mine.py, line {line}, in {method}\)$"
    said = rf"^data.sampler 'mine.py:Mine': {method}\(3?\) raised KeyError: 'answer' {place}"
    with pytest.raises(RunError, match=said):
        getattr(source, method)(*arguments)


@pytest.mark.parametrize("state", ["{1, 2}", "{'tasks': [self.stream]}", "{(1, 2): 3}"])
def test_a_state_that_no_checkpoint_can_hold(state: str) -> None:
    source = own(CLASS.replace('{"seen": [1]}', state))
    with pytest.raises(RunError, match=r"checkpoints store the result of state\(\) as JSON, but .*Return dicts"):
        source.state()


def test_what_a_stream_refuses_stays_as_it_is() -> None:
    source = own(CLASS.replace("return self.stream.take(n)", "raise UserError('no tasks')"))
    source._source.take.__globals__["UserError"] = UserError
    with pytest.raises(UserError, match=r"^no tasks$"):
        source.take(1)
    with pytest.raises(UserError, match=re.escape("take(2) must return a list of 2 tasks")):
        taken(own(), 2)
