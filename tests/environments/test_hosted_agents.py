"""Agents in worker processes: what they are called with, what they return, how they fail. Nobody is asked anything."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import asking
import pytest
from hosting import until

from grpo.config.environment import EnvironmentConfig
from grpo.environments.making import BLOCKED, make_host
from grpo.environments.results import NUMBERS
from grpo.environments.seats import Reply
from grpo.errors import UserError
from grpo.processes.tree import descendants

ASKING = Path(asking.__file__)
ENDPOINT = {"base_url": "http://127.0.0.1:1/v1", "api_key": "key", "seed": 5}


class Agents:
    """Makes each host once, and closes all."""

    def __init__(self) -> None:
        self._made = {}

    def __call__(self, function: str, inline: bool = False, **settings):
        key = repr((function, inline, settings))
        if key not in self._made:
            config = EnvironmentConfig(agent=f"{ASKING}:{function}", **settings)
            self._made[key] = make_host(config, given=getattr(asking, function) if inline else None)
        return self._made[key]

    def close(self) -> None:
        for host in self._made.values():
            host.close()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Agents]:
    made = Agents()
    yield made
    made.close()


def ran(host, **row) -> Reply:
    (seat,) = host.seats(0, 1)
    assert seat.reset({"prompt": "Go.", **row}, 5).result() == Reply()
    reply = seat.call("run", ENDPOINT).result()
    seat.release()
    return reply


def told(host, **row):
    reply = ran(host, **row)
    assert reply.kind == "ok", reply
    return json.loads(reply.value)


@pytest.mark.parametrize("inline", [False, True], ids=["process", "inline"])
def test_a_function_gets_the_row_and_where_to_ask(hosts, inline: bool) -> None:
    host = hosts("run", inline)
    assert told(host, start=3, other=1) == {
        "reward": 3.0,
        "metrics": {"columns": 3.0, "whole": 3.0, "asked": 24.0},  # prompt, other and seed
    }
    described = host.description
    assert (described.name, described.kind, list(described.tools)) == ("asking", "agent", [])
    assert described.rewards


def test_a_function_may_be_synchronous_and_take_few_columns(hosts) -> None:
    assert told(hosts("plain"), start=2, other=1) == {"reward": 2.0, "metrics": {}}
    more = hosts("plain", kwargs={"bonus": 0.5, "start": 7})
    assert told(more, start=2)["reward"] == 7.5, "the recipe's arguments come first"


def test_random_numbers_come_from_the_seed(hosts) -> None:
    host = hosts("seeded")
    first, second = told(host), told(host)
    assert first == second
    assert first["metrics"]["seed"] == 5.0
    assert told(host, seed=8)["metrics"]["seed"] == 8.0, "a column of this name is the dataset's"


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("none", {"reward": None, "metrics": {}}),
        ("no reward yet", {"reward": None, "metrics": {"score": 1.0}}),
        ("true", {"reward": 1.0, "metrics": {}}),
    ],
)
def test_what_may_be_returned(hosts, kind: str, value) -> None:
    assert told(hosts("of_kind"), kind=kind) == value


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("text", f"the returned reward is not a usable number: 'good'. {NUMBERS}"),
        ("nan", f"the returned reward is not a usable number: nan. {NUMBERS}"),
        ("list", f"the returned reward is not a usable number: [1.0]. {NUMBERS}"),
        ("no reward", "it returned a dict without 'reward'; the dict has score"),
        ("metric", f"the metric 'score' is not a usable number: 'high'. {NUMBERS}"),
        ("metric name", "it returned a metric named 3: names must be nonempty strings"),
        ("infinite", f"the metric 'score' is not a usable number: inf. {NUMBERS}"),
    ],
)
def test_what_may_not_be_returned(hosts, kind: str, said: str) -> None:
    assert ran(hosts("of_kind"), kind=kind) == Reply("error", error=said)


@pytest.mark.parametrize(
    ("function", "said"),
    [("raises", "ValueError: no luck"), ("leaves", "SystemExit: enough"), ("leaves_later", "SystemExit: enough")],
)
def test_what_is_raised_is_an_error_with_its_place(hosts, function: str, said: str) -> None:
    reply = ran(hosts(function))
    assert reply.kind == "error"
    assert reply.error.startswith(f"{said} ({ASKING}:"), reply.error
    assert ran(hosts(function)).kind == "error", "its process is still there"


@pytest.mark.parametrize("function", ["misread", "misread_later"])
def test_an_error_in_a_library_has_the_agent_s_own_line(hosts, function: str) -> None:
    (line,) = [n for n, text in enumerate(ASKING.read_text().splitlines(), 1) if text.endswith(f"# in {function}")]
    assert ran(hosts(function)).error.endswith(f" ({ASKING}:{line})")


@pytest.mark.parametrize("function", ["generator", "generator_later"])
def test_a_function_that_yields_is_told_to_return(hosts, function: str) -> None:
    assert ran(hosts(function)) == Reply(
        "error", error="it is a generator: use `return` for the reward instead of `yield`"
    )


def test_a_process_that_dies_takes_its_agents_along() -> None:
    host = make_host(EnvironmentConfig(agent=f"{ASKING}:dies"))
    try:
        one, other = host.seats(0, 2)
        for seat in (one, other):
            seat.reset({}, 0).result()
        reply = one.call("run", ENDPOINT).result()
        assert (reply.kind, reply.error) == ("crash", "its process ended while agents ran in it (exit code 7)")
        assert other.call("run", ENDPOINT).result().kind == "crash"
        assert ran(host).kind == "crash", "the next group has a new process"
    finally:
        host.close()


@pytest.mark.parametrize("function", ["sleeps", "blocks"])
def test_an_agent_that_takes_too_long_is_given_up(function: str) -> None:
    host = make_host(EnvironmentConfig(agent=f"{ASKING}:{function}", rollout_timeout=0.2))
    try:
        assert ran(host) == Reply("timeout", error=f"the agent gave no answer in 0.2 s{BLOCKED}")
        assert "environment.rollout_timeout" in BLOCKED
    finally:
        host.close()


def test_agents_run_side_by_side(hosts) -> None:
    seats = hosts("sleeps", kwargs={"seconds": 0.05}).seats(0, 3)
    for seat in seats:
        seat.reset({}, 0).result()
    futures = [seat.call("run", ENDPOINT) for seat in seats]
    assert not any(future.done() for future in futures)
    assert [json.loads(future.result().value)["reward"] for future in futures] == [None] * 3


def test_secrets_are_kept_unless_named_and_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "four")
    for env, kind in (((), "error"), (("MY_SECRET",), "ok")):
        host = make_host(EnvironmentConfig(agent=f"{ASKING}:secretive", env=env))
        reply = ran(host)
        assert reply.kind == kind
        assert kind == "ok" or "env: [MY_SECRET]" in reply.error
        host.close()


def test_no_proxy_stands_between_an_agent_and_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "there")
    host = make_host(EnvironmentConfig(agent=f"{ASKING}:proxied"))
    assert told(host)["metrics"] == {"past": 1.0, "kept": 1.0}
    host.close()


@pytest.mark.parametrize(
    ("function", "settings", "columns", "said"),
    [
        ("run", {}, ["start"], None),
        ("run", {"kwargs": {"start": 1}}, [], None),
        ("run", {}, ["other"], "run: missing a required argument: 'start'"),
        ("without_url", {}, [], "without_url has no parameter base_url, so it cannot call the model"),
        ("plain", {"kwargs": {"bonsu": 1}}, ["start"], "kwargs.bonsu: plain has no such argument"),
        ("run", {"kwargs": {"data": 1}}, ["start"], "kwargs.data: grpo sets this argument itself"),
    ],
)
def test_what_does_not_fit_is_found_before_the_run(hosts, function: str, settings, columns, said) -> None:
    problem = hosts(function, **settings).problem(["prompt", *columns])
    assert problem is None if said is None else said in problem


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        (f"{ASKING}:gone", f"agent '{ASKING}:gone': there is no function 'gone' in it"),
        (f"{ASKING.parent}/nowhere.py:run", "there is no file"),
        ("no_such_module:run", "there is no module 'no_such_module'"),
    ],
)
def test_an_agent_that_cannot_be_had_says_why(agent: str, said: str) -> None:
    host = make_host(EnvironmentConfig(agent=agent))
    with pytest.raises(UserError, match="agent") as error:
        _ = host.description
    host.close()
    assert said in str(error.value)


def test_what_an_agent_starts_ends_with_the_host() -> None:
    host = make_host(EnvironmentConfig(agent=f"{ASKING}:starts"))
    (seat,) = host.seats(0, 1)
    seat.reset({}, 0).result()
    seat.call("run", ENDPOINT)
    keeper = seat.home._process.pid
    until(lambda: len(descendants(keeper)) == 2)
    started = descendants(keeper)
    host.close()
    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
