"""What hosts do with processes, threads and time."""

import subprocess
import sys
import time

import games
import pytest
from hosting import GAMES, Hosts, begin, kill, names, opened, seat_of, slow_keeper, until
from scoring.test_workers import gone

from grpo.environments.process import ProcessTerms
from grpo.errors import UserError
from grpo.processes.tree import descendants

HERE = pytest.mark.parametrize("inline", [False, True], ids=["process", "inline"])


@pytest.fixture(scope="module")
def host():
    hosts = Hosts()
    yield hosts
    hosts.close()


def test_each_call_has_its_time_limit_for_itself(host) -> None:
    """All of them together take longer than the limit; each is far from it, on a busy machine, too."""
    seat, _ = seat_of(host("Walk", timeout=1.5), start=0)
    waits = [seat.call("wait", {"seconds": 0.1}) for _ in range(16)]
    assert {wait.result().value for wait in waits} == {"waited"}


def test_a_tool_has_a_time_limit_of_its_own(host) -> None:
    both = host("Walk", [("Stuck", {})], tool_settings={"timeout": 0.2})
    assert "hang" in names(both.description)
    seat, _ = seat_of(both, start=0)
    assert seat.call("wait", {"seconds": 0.4}).result().kind == "ok"
    assert seat.call("hang", {}).result().error == "'hang' gave no answer in 0.2 s"


def test_a_reply_that_nobody_wants_any_more_changes_nothing(host) -> None:
    walks = host("Walk")
    seat, _ = seat_of(walks, start=0)
    begin(lambda: seat.call("wait", {"seconds": 0.2}), seat).cancel()
    assert seat.call("move", {"by": 2}).result().value == "2"


def test_a_call_that_nobody_waits_for_has_its_time_limit_too(host) -> None:
    seat, _ = seat_of(host("Stuck", timeout=0.5))
    begin(lambda: seat.call("hang", {}), seat).cancel()
    assert seat.call("tell", {}).result().error == "'hang' gave no answer in 0.5 s"


def test_groups_are_spread_over_processes_and_each_has_one(host, capfd, monkeypatch) -> None:
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)
    walks = host("Walk", workers=2)
    assert walks.description.tools
    time.sleep(0.1)
    assert capfd.readouterr().err == ""  # what was imported for the schemas has nothing to say
    homes = [{seat.home for seat in walks.seats(group, 3)} for group in range(4)]
    assert [len(home) for home in homes] == [1] * 4
    assert homes[0] == homes[2] != homes[1] == homes[3]


def test_secrets_are_kept_from_it_unless_it_names_them(host, monkeypatch) -> None:
    monkeypatch.setenv("GAME_API_KEY", "k")
    _, reply = seat_of(host("Secretive"), name="GAME_API_KEY")
    assert reply.kind == "error"
    assert "env: [GAME_API_KEY]" in reply.error
    assert seat_of(host("Secretive", env=("GAME_API_KEY",)), name="GAME_API_KEY")[1].value == "k"
    with pytest.raises(UserError, match=r"environment 'Secretive': env: the environment has no variable NO_SUCH"):
        host("Secretive", env=("NO_SUCH",))


def test_a_call_that_hangs_in_this_process_is_given_up(host) -> None:
    both = host("Walk", [("Stuck", {})], inline=True, tool_settings={"timeout": 0.2})
    assert "hang" in names(both.description)  # which says whose tools are whose
    seat, other = both.seats(0, 2)
    for one in (seat, other):
        one.reset({"start": 0}, 0).result()
    assert seat.call("hang", {}).result().kind == "timeout"
    assert other.call("rules", {}).result().value == "none"
    until(lambda: other.home.retired)
    new, _ = seat_of(both, start=0)
    assert new.home is not other.home
    assert [one.call("rules", {}).result().value for one in (other, new)] == ["none"] * 2


def test_a_call_that_spins_in_this_process_is_stopped_and_its_host_can_be_closed() -> None:
    """The home is ended when its last seat is lost, before its host is closed."""
    stuck = opened("Stuck", inline=True, timeout=0.3)
    seat, _ = seat_of(stuck)
    (chair,) = seat.home._chairs._seats.values()
    assert seat.call("spin", {}).result().kind == "timeout"
    until(lambda: not chair.thread._thread.is_alive())
    until(seat.home._chairs._loop.is_closed)
    stuck.close()


def test_nothing_outlives_a_trainer_that_is_killed(tmp_path) -> None:
    script = f"""
from grpo.config.environment import EnvironmentConfig
from grpo.environments.making import make_host
host = make_host(EnvironmentConfig(use={str(GAMES)!r} + ":Walk"))
(seat,) = host.seats(0, 1)
print(host.description.name, seat.reset({{"start": 1}}, 0).result().value, flush=True)
import time
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout.readline() == "Walk  You are at 1.\n"
        below = descendants(trainer.pid)
        assert len(below) == 2  # the keeper and its worker
        trainer.kill()
    for pid in below:
        assert gone(pid)


def test_asynchronous_calls_wait_together(host) -> None:
    seats = host("Crowd").seats(0, 64)
    for seat in seats:
        seat.reset({}, 0)
    waits = [seat.call("wait", {"others": 64}) for seat in seats]
    assert {wait.result().value for wait in waits} == {"64"}


def test_all_synchronous_calls_are_made_in_one_thread(host) -> None:
    seat, reply = seat_of(host("Notebook"))
    assert reply.kind == "ok"
    assert [seat.call("write", {"text": "x"}).result().value for _ in range(2)] == ["1", "2"]


@HERE
def test_objects_are_made_once_and_reset_often(host, inline: bool) -> None:
    games.Walk.made = 0
    walks = host("make_walk", inline=inline, kwargs={"size": 3})
    assert walks.description.name == "Walk"
    for start in range(5):
        seat, reply = seat_of(walks, start=start)
        assert reply.value == f" You are at {start}."
        assert seat.call("count", {}).result().value == "1"
        seat.release()
    both = walks.seats(0, 2)
    for seat in both:
        seat.reset({"start": 0}, 0).result()
    assert both[0].call("count", {}).result().value == "2"


def test_its_processes_load_nothing_of_mlx(host) -> None:
    assert seat_of(host("Light"))[1].value == "[]"


def test_a_host_that_nobody_closed_is_silent_when_python_ends() -> None:
    code = f"""
from grpo.config.environment import EnvironmentConfig
from grpo.environments.making import make_host
host = make_host(EnvironmentConfig(use="{GAMES}:Walk", workers=2))
host.description
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_process_that_dies_changes_nothing_in_what_is_known_of_it(host) -> None:
    """In the first step of a run it used to end the run: rollouts look the description up again."""
    walks = host("Walk", workers=2)
    known = walks.description
    seats = [walks.seats(group, 1)[0] for group in (0, 1)]
    for seat in seats:
        assert seat.reset({"start": 0}, 0).result().kind == "ok"
    kill(seats[0])
    assert seats[0].call("move", {"by": 1}).result().kind == "crash"
    assert walks.description == known
    assert seats[1].call("move", {"by": 1}).result().value == "1"
    again, _ = seat_of(walks, start=0)
    assert again.call("move", {"by": 2}).result().value == "2"


def test_a_process_that_cannot_be_started_loses_its_seats_and_not_the_run(host, monkeypatch) -> None:
    def fails(*_):
        raise BlockingIOError("Resource temporarily unavailable")

    walks = host("Walk", timeout=7.0)
    assert walks.description.tools
    seat, _ = seat_of(walks, start=0)
    with monkeypatch.context() as broken:
        broken.setattr(ProcessTerms, "start", fails)
        kill(seat)
        assert seat.call("move", {"by": 1}).result().kind == "crash"
        reply = walks.seats(0, 1)[0].reset({"start": 0}, 0).result()
        assert (reply.kind, reply.error) == (
            "crash",
            "its process cannot be started: Resource temporarily unavailable",
        )
    again, _ = seat_of(walks, start=0)
    assert again.call("move", {"by": 2}).result().value == "2"


def test_a_call_that_waits_while_its_process_dies_says_so_and_not_that_it_took_too_long(host) -> None:
    walks = host("Walk", timeout=0.4)
    seat, _ = seat_of(walks, start=0)
    with slow_keeper(seat):
        kill(seat)
        waits = seat.call("move", {"by": 1})
        time.sleep(0.8)
    assert waits.result().kind == "crash"


def test_conversations_that_begin_while_a_process_dies_get_a_new_one(host) -> None:
    walks = host("Walk", timeout=9.0)
    seat, _ = seat_of(walks, start=0)
    with slow_keeper(seat):
        kill(seat)
        until(lambda: seat.home._writer.is_closing())
        new, reply = seat_of(walks, start=3)
    assert (reply.kind, reply.value) == ("ok", " You are at 3.")
    assert new.home is not seat.home
    assert seat.call("move", {"by": 1}).result().kind == "crash"
