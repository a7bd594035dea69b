"""Rewards that take `environments`, called where these live."""

import pickle
import time
from pathlib import Path

import games
import pytest

from grpo.config.environment import EnvironmentConfig
from grpo.environments.making import make_host
from grpo.environments.seats import HostedReward
from grpo.errors import UserError
from grpo.plugins import Located

FILE = """
import os
import time

CALLS = "group"

def places(completions, environments, answer, log_extra, **_):
    log_extra("at", [env.place for env in environments])
    return [env.place + len(text) + one for env, text, one in zip(environments, completions, answer)]

async def asks(environments, **_):
    return [float((await env.wait(0)) == "waited") for env in environments]

def raises(environments, **_):
    raise ValueError("no")

def hangs(environments, **_):
    time.sleep(1000)

def exits(environments, **_):
    os._exit(2)

def bad_argument(environments, completions, scale=1.0, **_):
    return [scale for _ in completions]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "seeing.py"
    path.write_text(FILE)
    return path


@pytest.fixture(params=[False, True], ids=["process", "inline"])
def walks(request):
    host = make_host(EnvironmentConfig(use=f"{Path(games.__file__)}:Walk"), given=games.Walk if request.param else None)
    yield host
    host.close()


def load(host, file, name: str, **settings) -> None:
    host.load_reward(HostedReward(Located(name, f"{file}:{name}", "reward"), settings.pop("kwargs", {}), **settings))


def sitting(host, *starts: int):
    seats = host.seats(0, len(starts))
    for seat, start in zip(seats, starts, strict=True):
        assert seat.reset({"start": start}, 0).result().kind == "ok"
    return seats


def columns(*texts: str) -> bytes:
    given = {"prompts": ["?"] * len(texts), "completions": list(texts), "completion_ids": [[1]] * len(texts)}
    return pickle.dumps({**given, "answer": [100] * len(texts)})


def test_a_reward_sees_the_environments_of_its_group(walks, file) -> None:
    loaded = walks.load_reward(HostedReward(Located("places", f"{file}:places", "reward"), {}))
    assert (loaded.calls, loaded.paid) == ("group", False)
    assert walks.reward_problem("places", ["prompt", "answer"]) is None
    assert "missing a required argument: 'answer'" in walks.reward_problem("places", ["prompt"])
    seats = sitting(walks, 1, 2, 3)
    answer = walks.score("places", seats, columns("a", "bb", "ccc"), {"step": 1}).result()
    assert (answer["values"], answer["failures"], answer["extras"]) == ([102.0, 104.0, 106.0], {}, {"at": [1, 2, 3]})


def test_a_reward_may_await_what_the_environments_have(walks, file) -> None:
    load(walks, file, "asks")
    assert walks.score("asks", sitting(walks, 0, 0), columns("a", "b"), {}).result()["values"] == [1.0, 1.0]


def test_one_seat_that_is_lost_fails_alone(walks, file) -> None:
    load(walks, file, "places")
    seats = sitting(walks, 1, 2, 3)
    seats[1].reset({}, 0).result()  # without `start` it raises, and the object is thrown away
    answer = walks.score("places", seats, columns("a", "b", "c"), {}).result()
    assert (answer["values"], list(answer["failures"])) == ([102.0, None, 104.0], [1])
    assert answer["extras"] == {"at": [1, None, 3]}


def test_what_it_raises_is_a_failure_of_all(walks, file) -> None:
    load(walks, file, "raises")
    answer = walks.score("raises", sitting(walks, 0, 0), columns("a", "b"), {}).result()
    assert answer["values"] == [None, None]
    assert all(error.startswith("ValueError: no") for error in answer["failures"].values())


def test_a_hung_reward_is_given_up_and_the_seats_go_on(walks, file) -> None:
    load(walks, file, "hangs", timeout=0.3)
    load(walks, file, "places")
    seats = sitting(walks, 4)
    answer = walks.score("hangs", seats, columns("a"), {}).result()
    assert (answer["kind"], answer["fatal"], list(answer["failures"])) == ("timeout", True, [0])
    assert seats[0].call("look", {}).result().value == "at 4"
    assert walks.score("places", seats, columns("a"), {}).result()["values"] == [105.0]
    for _ in range(100):
        if seats[0].home.retired:
            break
        time.sleep(0.05)
    new = sitting(walks, 5)
    assert new[0].home is not seats[0].home
    assert walks.score("hangs", new, columns("a"), {}).result()["kind"] == "timeout"  # loaded there, too


def test_a_reward_that_ends_the_process(file) -> None:
    host = make_host(EnvironmentConfig(use=f"{Path(games.__file__)}:Walk"))
    try:
        load(host, file, "exits")
        seats = sitting(host, 0, 0)
        answer = host.score("exits", seats, columns("a", "b"), {}).result()
        assert answer["fatal"]
        assert answer["failures"][1].startswith("its process ended in a call (exit code 2)")
        assert seats[0].call("look", {}).result().kind == "crash"
    finally:
        host.close()
    assert host.score("exits", seats, columns("a", "b"), {}).result()["values"] == [None, None]


def test_a_reward_that_cannot_be_had_is_told_at_once(walks, file) -> None:
    with pytest.raises(UserError, match="no function 'plcaes' in it"):
        load(walks, file, "plcaes")
    with pytest.raises(UserError, match=r"reward 'bad_argument': kwargs\.scal: there is no such argument"):
        load(walks, file, "bad_argument", kwargs={"scal": 1.0})


def test_a_function_that_was_given_as_an_object_is_imported_by_other_processes(file) -> None:
    """What only this session knows cannot be had there."""
    host = make_host(EnvironmentConfig(use=f"{Path(games.__file__)}:Walk"))
    try:
        with pytest.raises(UserError, match=r"^reward .*a Python object in the session.*Put it into a file"):
            host.load_reward(HostedReward(Located("own", "__main__:own", "reward"), {}, function=lambda **_: [0.0]))
        located = Located("exits", f"{file}:exits", "reward")
        assert host.load_reward(HostedReward(located, {}, function=lambda **_: [0.0])).calls == "group"
    finally:
        host.close()
