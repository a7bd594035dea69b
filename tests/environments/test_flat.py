"""Hosts that live long hold no more memory and no more descriptors than young ones."""

import os
from pathlib import Path

import games
import pytest

from grpo.config.environment import EnvironmentConfig
from grpo.environments.making import make_host
from grpo.processes.tree import PAGE, descendants


def descriptors(*pids: int) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), *pids))


def memory(*pids: int) -> int:
    """Bytes that processes hold."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE for pid in (os.getpid(), *pids))


def opened(name: str, inline: bool = False, file: str = games.__file__):
    return make_host(EnvironmentConfig(use=f"{file}:{name}"), given=getattr(games, name) if inline else None)


def converse(host, times: int, n: int = 8) -> None:
    """`times` groups of `n` conversations at once."""
    for group in range(times):
        seats = host.seats(group, n)
        for seat in seats:
            seat.reset({"start": 1, "text": "x" * 10_000}, group)
        calls = [seat.call("move", {"by": 1}) for seat in seats] + [seat.call("wait", {"seconds": 0}) for seat in seats]
        wrong = [seat.call("move", {"by": 100}) for seat in seats]
        rewards = [seat.reward() for seat in seats]
        assert {call.result().kind for call in calls} == {"ok"}
        assert {call.result().kind for call in wrong} == {"error"}
        assert {reward.result().value for reward in rewards} == {2.0}
        for seat in seats:
            seat.release()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
@pytest.mark.parametrize("inline", [False, True], ids=["process", "inline"])
@pytest.mark.parametrize("times", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_conversations_leave_nothing(times: int, inline: bool) -> None:
    host = opened("Walk", inline)
    try:
        converse(host, 5)
        pids = descendants(os.getpid())
        before, held = descriptors(*pids), memory(*pids)
        converse(host, times)
        assert descendants(os.getpid()) == pids
        assert descriptors(*pids) == before
        assert memory(*pids) - held < 4 << 20
    finally:
        host.close()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_hosts_and_processes_that_end_leave_nothing() -> None:
    hostile = str(Path(__file__).with_name("enemies.py"))

    def live_and_die() -> None:
        host = opened("Bad", file=hostile)
        for _ in range(2):
            (seat,) = host.seats(0, 1)
            seat.reset({}, 0)
            assert seat.call("do", {"what": "exit"}).result().kind == "crash"
            seat.release()
        host.close()
        inline = opened("Walk", inline=True)
        converse(inline, 1)
        inline.close()

    live_and_die()
    before = descriptors(), set(descendants(os.getpid()))
    live_and_die()
    assert (descriptors(), set(descendants(os.getpid()))) == before
