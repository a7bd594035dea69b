"""TRL's contract for environments and tools, in a process and in this one."""

import inspect
from operator import attrgetter

import games
import pytest
from hosting import GAMES, Hosts, names, seat_of

from grpo.config.environment import EnvironmentConfig
from grpo.environments.making import make_host
from grpo.errors import UserError

HERE = pytest.mark.parametrize("inline", [False, True], ids=["process", "inline"])


def place(name: str) -> str:
    """A pattern for where something in `games.py` is."""
    _, line = inspect.getsourcelines(attrgetter(name)(games))
    return rf"\(.*games\.py:{line}\)"


@pytest.fixture(scope="module")
def host():
    hosts = Hosts()
    yield hosts
    hosts.close()


@HERE
def test_which_methods_are_tools(host, inline: bool) -> None:
    told = host("Walk", inline=inline).description
    walk = ["blocks", "bound", "columns", "count", "look", "move", "rules", "scored", "wait"]
    assert (told.name, told.kind, told.rewards, told.resets, names(told)) == ("Walk", "tools", True, True, walk)
    move = next(tool["function"] for tool in told.tools if tool["function"]["name"] == "move")
    assert move["description"] == "Move."
    assert move["parameters"] == {
        "type": "object",
        "properties": {
            "by": {"type": "integer", "description": "How far."},
            "fast": {"type": "boolean", "description": "Whether to hurry."},
        },
        "required": ["by"],
    }


@HERE
def test_a_conversation(host, inline: bool) -> None:
    seat, reply = seat_of(host("Walk", inline=inline), start=7, prompt="?", answer="x")
    assert (reply.kind, reply.value) == ("ok", " You are at 7.")
    calls = [
        ("move", {"by": 2}, ("ok", "9", "")),
        ("move", {"by": 1}, ("error", None, "Game over.")),
        ("look", {}, ("ok", "at 9", "")),
        ("rules", {}, ("ok", "none", "")),
        ("bound", {}, ("ok", "bound", "")),
        ("wait", {"seconds": 0}, ("ok", "waited", "")),
        ("blocks", {}, ("ok", [{"type": "text", "text": "é?"}], "")),
        ("columns", {}, ("ok", "['answer', 'prompt']", "")),
        ("nothing", {}, ("error", None, "Tool nothing not found.")),
        ("reset", {}, ("error", None, "Tool reset not found.")),
        ("move", {"to": 1}, ("error", None, "Walk.move() got an unexpected keyword argument 'to'")),
    ]
    for name, arguments, expected in calls:
        reply = seat.call(name, arguments).result()
        assert (reply.kind, reply.value, reply.error) == expected
    step = seat.call("scored", {}).result()
    assert (step.value, step.reward, step.done) == ("well", 0.5, True)
    assert seat.reward().result().value == 9.0


@HERE
def test_one_that_answers_as_the_user(host, inline: bool) -> None:
    guess = host("Guess", inline=inline)
    assert (guess.description.kind, guess.description.tools) == ("text", [])
    seat, reply = seat_of(guess, seed=7)
    assert reply.value is None
    said = {"role": "assistant", "content": "hello"}
    answer = seat.step(said).result()
    assert (answer.value, answer.reward, answer.done) == ([{"role": "user", "content": "HELLO"}], 1.0, False)
    end = seat.step({"role": "assistant", "content": "end"}).result()
    assert (end.value, end.done) == (None, True)
    assert seat.reward().result().value == 0.5
    assert seat.step({"role": "assistant", "content": "secret"}).result().value[0]["content"].startswith("7 ")


def test_one_that_answers_with_messages_may_have_tools(host) -> None:
    chat = host("Chat")
    assert (chat.description.kind, names(chat.description)) == ("messages", ["hint"])
    seat, _ = seat_of(chat)
    answer = seat.step({"role": "assistant", "content": "x"}).result()
    assert answer.value == [{"role": "user", "content": "assistant said x"}]
    assert len(seat.step({"role": "assistant", "content": "many"}).result().value) == 2
    assert seat.call("hint", {}).result().value == "hint"


def test_a_step_with_another_parameter_is_a_tool(host) -> None:
    told = host("Gym").description
    assert (told.kind, names(told), told.resets, told.rewards) == ("tools", ["step"], False, False)


def test_one_that_makes_trajectories_by_itself_is_recognised(host) -> None:
    assert host("OwnLoop").description.kind == "rollout"


@HERE
def test_tools_beside_an_environment_and_alone(host, inline: bool) -> None:
    tools = [("search", {"key": "k", "limit": 3}), ("Counter", {"start": 5})]
    beside = host("Gym", tools, inline)
    assert names(beside.description) == ["search", "add", "step"]
    schema = beside.description.tools[0]["function"]["parameters"]
    assert (list(schema["properties"]), schema["required"]) == (["query"], ["query"])
    seat, _ = seat_of(beside)
    assert seat.call("search", {"query": "q", "key": "mine"}).result().value == "q 3 k"
    assert [seat.call("add", {"n": 1}).result().value for _ in range(2)] == ["6", "7"]
    alone = host(None, tools[1:], inline)
    assert (alone.description.name, alone.description.kind, names(alone.description)) == ("tools", "tools", ["add"])
    first, second = alone.seats(0, 2)
    for seat in (first, second):
        assert seat.reset({}, 0).result().kind == "ok"
    assert [one.call("add", {"n": 1}).result().value for one in (first, second, first)] == ["6", "6", "7"]


def test_the_column_that_chose_is_not_passed(host) -> None:
    seat, _ = seat_of(host("Walk", several=True), start=0, environment="walk", prompt="?")
    assert seat.call("columns", {}).result().value == "['prompt']"
    seat, _ = seat_of(host("Walk"), start=0, environment="walk")
    assert seat.call("columns", {}).result().value == "['environment']"


@HERE
@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "NoHints",
            rf"the tool 'jump' {place('NoHints.jump')} has no schema: Argument far is missing a type hint",
        ),
        (
            "NoWords",
            rf"^environment 'NoWords': the tool 'jump' {place('NoWords.jump')} .* no description for the argument",
        ),
        (
            "NoWords",
            "`far: The far to look up.`. If the model must not call it, start its name with an under",
        ),
        ("search", rf"search\(\) missing 2 required .* {place('search')}: .* the model to call belongs in `tools`$"),
        ("NoObject", r"cannot be created: RuntimeError: no board \(.*games.py:\d+\)"),
    ],
)
def test_what_cannot_be_is_said_before_the_run(host, name: str, said: str, inline: bool) -> None:
    with pytest.raises(UserError, match=said):
        _ = host(name, inline=inline).description


@HERE
def test_arguments_that_a_class_does_not_have(host, inline: bool) -> None:
    said = rf"'Guess': cannot be created: Guess\(\) takes no arguments {place('Guess')}: it is called with"
    with pytest.raises(UserError, match=said):
        _ = host("Guess", inline=inline, kwargs={"sise": 3}).description
    with pytest.raises(
        UserError, match=rf"^tools.0: cannot be created: .* 'sise' {place('Counter')}: it is called with"
    ):
        _ = host(None, [("Counter", {"sise": 3})], inline=inline).description


@HERE
def test_tools_are_told_of_by_their_places(host, inline: bool) -> None:
    with pytest.raises(
        UserError, match=rf"^tools.0: the tool 'jump' {place('NoWords.jump')} has no schema: .*look up.`$"
    ):
        _ = host(None, [("NoWords", {})], inline=inline).description
    tools = host(None, [("Picky", {})], inline=inline)
    assert tools.problem(["prompt"]).startswith("tools.0 (Picky): reset: missing a required argument: ")


def test_a_name_that_means_nothing(host) -> None:
    with pytest.raises(UserError, match="no class 'Wlak' in it"):
        _ = make_host(EnvironmentConfig(use=f"{GAMES}:Wlak")).description


@HERE
def test_columns_that_do_not_fit_are_told_before_the_run(host, inline: bool) -> None:
    picky = host("Picky", inline=inline)
    assert picky.problem(["question"]) is None
    assert "unexpected keyword argument 'prompt'" in picky.problem(["question", "prompt"])
    assert "missing a required argument: 'question'" in picky.problem([])
    assert host("Guess", inline=inline).problem(["prompt"]) is None


def test_a_column_of_the_name_seed_is_the_rows(host) -> None:
    (seat,) = host("Guess").seats(0, 1)
    assert seat.reset({"seed": 3}, 8).result().kind == "ok"
    assert seat.step({"role": "assistant", "content": "secret"}).result().value[0]["content"].startswith("3 ")
