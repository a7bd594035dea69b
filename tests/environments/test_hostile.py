"""Hostile environments beside a good one: each loses its own conversations, and nothing else."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from grpo.config.environment import EnvironmentConfig
from grpo.environments import home, process
from grpo.environments.making import make_host
from grpo.environments.results import NUMBERS
from grpo.processes import endings
from grpo.processes.tree import descendants

HOSTILE = Path(__file__).with_name("enemies.py")


def opened(name: str, **settings):
    return make_host(EnvironmentConfig(use=f"{HOSTILE}:{name}", **{"timeout": 20, "reset_timeout": 20, **settings}))


@pytest.fixture(scope="module")
def host(good):
    """Hosts, each made once, whatever became of its processes; nothing is left of them in the end."""
    made, before = {}, set(descendants(os.getpid()))

    def make(name, **settings):
        key = (name, *settings.items())
        if key not in made:
            made[key] = opened(name, **settings)
        return made[key]

    yield make
    for one in made.values():
        one.close()
    assert set(descendants(os.getpid())) <= before


@pytest.fixture(scope="module")
def good():
    one = opened("Good")
    assert one.description.name == "Good"
    yield one
    one.close()


class Beside:
    """A conversation with the good environment, which goes on while others misbehave."""

    def __init__(self, good) -> None:
        self.seats = good.seats(0, 2)
        for seat in self.seats:
            assert seat.reset({}, 0).result().kind == "ok"
        self.said = 0

    def goes_on(self) -> None:
        self.said += 1
        assert [seat.call("add", {"n": 1}).result().value for seat in self.seats] == [str(self.said)] * 2
        assert [seat.reward().result().value for seat in self.seats] == [float(self.said)] * 2


@pytest.fixture
def beside(good):
    one = Beside(good)
    yield one
    one.goes_on()
    for seat in one.seats:
        seat.release()


def sitting(host, n: int = 1):
    seats = host.seats(0, n)
    for seat in seats:
        assert seat.reset({}, 0).result().kind == "ok"
    return seats


def serves_again(host) -> None:
    (seat,) = sitting(host)
    assert seat.call("add", {"n": 2}).result().value == "2"
    seat.release()


def until(condition) -> bool:
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_reset_that_hangs(host, beside) -> None:
    hangs = host("HangsInReset", reset_timeout=0.3)
    assert hangs.description.resets
    seat, other = hangs.seats(0, 2)
    assert other.reset({"hang": False}, 0).result().kind == "ok"
    reply = seat.reset({}, 0).result()
    assert (reply.kind, reply.error) == ("timeout", "reset gave no answer in 0.3 s")
    assert seat.call("add", {"n": 1}).result() == reply
    beside.goes_on()
    assert other.call("add", {"n": 1}).result().value == "1"
    assert until(lambda: other.home.retired)
    assert hangs.seats(0, 1)[0].home is not other.home
    assert other.call("add", {"n": 1}).result().value == "2"
    other.release()
    assert until(lambda: other.home.lost is not None)


@pytest.mark.parametrize("call", [("do", "hang"), ("do", "spin"), ("do_async", "defy")])
def test_a_call_that_hangs_fails_its_own_seat_and_the_process_is_replaced_later(host, beside, call) -> None:
    bad = host("Bad", timeout=1.5)
    assert bad.description.rewards
    seat, other = sitting(bad, 2)
    assert seat.call(call[0], {"what": call[1]}).result().kind == "timeout"
    beside.goes_on()
    assert other.call("add", {"n": 1}).result().value == "1"
    seat.release()
    assert until(lambda: other.home.retired)
    assert other.call("add", {"n": 1}).result().value == "2"
    other.release()
    assert until(lambda: other.home.lost is not None)
    serves_again(bad)


def test_an_asynchronous_call_that_can_be_ended_costs_no_process(host) -> None:
    bad = host("Bad", timeout=0.5)
    seat, other = sitting(bad, 2)
    assert seat.call("do_async", {"what": "sleep"}).result().kind == "timeout"
    assert until(lambda: seat._dropping.done())
    assert other.call("add", {"n": 1}).result().value == "1"
    assert not other.home.retired
    assert bad.seats(0, 1)[0].home is other.home


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("exit", "crash", "its process ended in a call (exit code 3)"),
        ("segfault", "crash", "its process ended in a call (SIGSEGV)"),
        ("fill", "memory", "it used more than memory_gb (0.6) in a call"),
        ("noise", "crash", "its process sent an invalid message in a call (KeyError: 'id')"),
    ],
)
def test_what_ends_the_process_fails_all_seats_in_it(host, beside, what: str, kind: str, said: str) -> None:
    bad = host("Bad", memory_gb=0.6)
    seat, waiting, idle = sitting(bad, 3)
    pending = waiting.call("do", {"what": "hang"})
    reply = seat.call("do", {"what": what}).result()
    assert (reply.kind, reply.error[: len(said)]) == (kind, said)
    assert pending.result() == idle.call("add", {"n": 1}).result() == reply
    beside.goes_on()
    for one in (seat, waiting, idle):
        one.release()
    serves_again(bad)


@pytest.mark.parametrize("call", [("do", "hold"), ("do_async", "block")])
def test_a_call_that_holds_the_process_fails_all_seats_in_it(host, beside, call, monkeypatch) -> None:
    monkeypatch.setattr(home, "GRACE", 1.5)
    bad = host("Bad", timeout=0.5)
    seat, idle = sitting(bad, 2)
    assert seat.call(call[0], {"what": call[1]}).result().kind == "timeout"
    beside.goes_on()
    assert until(lambda: idle.home.lost is not None)
    assert idle.call("add", {"n": 1}).result().error == home.HELD
    serves_again(bad)


def test_hundred_megabytes_printed_and_returned(host, beside, capfd) -> None:
    bad = host("Bad")
    assert bad.description.rewards
    (seat,) = sitting(bad)
    assert seat.call("do", {"what": "print"}).result().value == "printed"
    beside.goes_on()
    reply = seat.call("do", {"what": "tell"}).result()
    assert reply.error == "the result is too long: 100,000,000 characters, but at most 1,000,000 are allowed"
    assert seat.call("add", {"n": 1}).result().value == "1"
    seat.release()
    time.sleep(0.1)
    bad.seats(0, 1)
    said = capfd.readouterr().err
    assert len(said) < 100_000
    assert "[Bad] printed 99," in said


def test_children_that_are_left_are_gone_with_the_process(host, beside) -> None:
    bad = host("Bad")
    (seat,) = sitting(bad)
    before = set(descendants(os.getpid()))
    assert seat.call("do", {"what": "fork"}).result().value == "forked"
    children = set(descendants(os.getpid())) - before
    assert len(children) == 30
    assert seat.call("do", {"what": "twice"}).result().value == "twice"
    (second,) = set(descendants(os.getpid())) - before - children
    state = ["ps", "-o", "stat=", "-p", str(second)]
    assert until(lambda: subprocess.run(state, capture_output=True, text=True).stdout.startswith("Z"))  # it has ended
    assert seat.call("add", {"n": 1}).result().value == "1"
    assert seat.call("do", {"what": "exit"}).result().kind == "crash"
    assert not children & set(descendants(os.getpid()))


def test_exceptions_and_wrong_types_are_errors_of_their_own_call(host, beside) -> None:
    wrong = host("Wrong")
    seat, other = wrong.seats(0, 2)
    for what, said in [
        ("raise", "ZeroDivisionError: division ("),
        ("number", "reset returned 5: return None, text, or a list of content blocks"),
        ("thing", "reset returned a Thing: "),
        ("list", "reset returned [1]: "),
    ]:
        (one,) = wrong.seats(0, 1)
        reply = one.reset({"what": what}, 0).result()
        assert (reply.kind, reply.error[: len(said)]) == ("error", said)
        one.release()
    assert [one.reset({}, 0).result().kind for one in (seat, other)] == ["ok", "ok"]
    for tool, value, error in [
        ("thing", None, "no words"),
        ("numbers", "[1, 2]", ""),
        (
            "blocks",
            None,
            "it returned content that JSON cannot represent: Object of type Thing is not JSON serializable",
        ),
        ("unprintable", None, "<exception str() failed>"),
        ("interrupt", None, "KeyboardInterrupt"),
        ("nothing", None, "RuntimeError"),
    ]:
        reply = seat.call(tool, {}).result()
        assert (reply.value, reply.error) == (value, error)
    assert seat.reward().result().error == f"get_reward is not a usable number: 'much'. {NUMBERS}"
    unsendable = seat.call("add", {"n": lambda: 1}).result()
    assert unsendable.kind == "error"
    assert other.call("add", {"n": 1}).result().value == "1"


def test_a_closed_host_answers() -> None:
    bad = opened("Bad")
    seat, other = sitting(bad, 2)
    pending = seat.call("do", {"what": "hang"})
    bad.close()
    assert pending.result().kind == "crash"
    assert other.call("add", {"n": 1}).result() == home.CLOSED
    other.release()


def test_one_that_hangs_when_imported(host, tmp_path, monkeypatch) -> None:
    """The event loop has let go of its descriptor by then: the number may soon be another process's."""
    watched = []

    def killed(child, *arguments):
        watched.extend(key.fd for key in slow.loop._selector.get_map().values() if key.fd == channel)
        return endings.killed(child, *arguments)

    monkeypatch.setattr(process, "START_SECONDS", 0.5)
    monkeypatch.setattr(process, "killed", killed)
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(1000)")
    slow = make_host(EnvironmentConfig(use=f"{tmp_path}/slow.py:Game"))
    channel = slow._homes[0]._process.channel.fileno()
    with pytest.raises(Exception, match=r"no answer in 0\.5 s when imported, so its process was killed"):
        _ = slow.description
    assert watched == []
    slow.close()
