"""The protocol of sources, as the stream of a recipe keeps it, and the names of tasks."""

import pytest

from grpo.config import DataConfig
from grpo.data.prompts import PromptRenderer
from grpo.data.source import METHODS, Source, checked_source, taken
from grpo.data.stream import TaskStream, first_tasks
from grpo.errors import UserError

ROWS = [{"question": "2+2?", "answer": answer} for answer in ("4", "four", "4")]


@pytest.fixture
def stream(toy):
    renderer = PromptRenderer(DataConfig(source="rows", prompt="question"), toy[1])
    return lambda: TaskStream(ROWS, renderer, seed=0)


def test_the_stream_is_a_source(stream) -> None:
    methods = [name for name, value in vars(Source).items() if callable(value) and name[0] != "_"]
    assert methods == [*METHODS]
    assert checked_source(source := stream()) is source
    assert all(callable(getattr(stream(), name)) for name in methods)


def test_what_is_observed_does_not_change_the_stream(stream) -> None:
    told, untold = stream(), stream()
    for _ in range(3):
        tasks = told.take(2)
        told.observe([])
        assert tasks == untold.take(2)
    assert told.state() == untold.state()


def test_a_state_that_was_written_before_there_was_a_protocol_loads(stream) -> None:
    """As `state.json` of such runs has it: 7 rows visited, 2 of them left out."""
    old, new = stream(), stream()
    tasks = old.take(7)
    new.load_state({"cursor": 7, "dropped": 2})
    assert (new.take(2), len(tasks)) == (old.take(2), 7)
    assert new.metrics() == {"dropped_prompts": 2.0, "epoch": 3.0}
    assert new.state() == {"cursor": 9, "dropped": 2}


def test_rows_with_one_prompt_are_as_many_tasks(stream) -> None:
    tasks = stream().take(3)
    assert len({task.prompt_ids for task in tasks}) == 1
    assert {task.identity for task in tasks} == {("data", 0), ("data", 1), ("data", 2)}


def test_held_out_rows_are_other_tasks(toy) -> None:
    renderer = PromptRenderer(DataConfig(source="rows", prompt="question"), toy[1], source="eval")
    assert [task.identity for task in first_tasks(ROWS, renderer, 2)] == [("eval", 0), ("eval", 1)]


@pytest.mark.parametrize(
    ("give", "said"),
    [
        (lambda tasks: None, r"source Own: take\(3\) must return a list of 3 tasks .*, but it returned NoneType"),
        (lambda tasks: tasks[:2], "but it returned 2: start over when the tasks are used up"),
        (lambda tasks: [*tasks, *tasks], "but it returned 6"),
        (lambda tasks: [*tasks[:2], None], "the list contains NoneType: a stream gives None"),
    ],
)
def test_what_a_source_gives_are_as_many_tasks_as_were_asked_for(stream, give, said) -> None:
    class Own:
        def take(self, n: int):
            return give(stream().take(n))

    with pytest.raises(UserError, match=said):
        taken(Own(), 3)
    assert taken(stream(), 3) == stream().take(3)
