"""Which process was lost, how the others hear of it, and what they do then."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from grpo.backend.links import Door, Link, Member, addresses, cut_ring, machine
from grpo.backend.watch import BEAT, CALL, Lost, LostRank, Watch, is_running, silence
from grpo.errors import UserError


def members(size: int) -> list[Member]:
    return [Member(f"host{rank}", 0, f"machine{rank}", (), 0, "") for rank in range(size)]


def pair(one: int, other: int) -> tuple[Link, Link]:
    """The two ends of a link between processes."""
    mine, theirs = socket.socketpair()
    mine.setblocking(False)
    theirs.setblocking(False)
    return Link(other, mine), Link(one, theirs)


@pytest.fixture(autouse=True)
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the links that a test leaves open."""
    made: list[socket.socket] = []
    paired = socket.socketpair

    def kept() -> tuple[socket.socket, socket.socket]:
        both = paired()
        made.extend(both)
        return both

    monkeypatch.setattr(socket, "socketpair", kept)
    yield
    for sock in made:
        sock.close()


def ring(size: int) -> list[Watch]:
    """The watches of processes linked in a ring, not started: a test lets them listen."""
    ends: list[list[Link]] = [[] for _ in range(size)]
    for rank in range(size):
        after = (rank + 1) % size
        mine, theirs = pair(rank, after)
        ends[rank].insert(0, mine)
        ends[after].append(theirs)
    return [Watch(rank, members(size), links, silence=10.0) for rank, links in enumerate(ends)]


def close(watch: Watch) -> None:
    """What the end of a process does to its links."""
    for link in watch._links:
        link.sock.close()


def listen(*watches: Watch) -> None:
    for watch in watches:
        watch._listen(0.01)


def test_a_process_that_dies_is_named_to_all() -> None:
    first, second, third, fourth = watches = ring(4)
    close(third)
    listen(second, fourth, first, second, fourth)
    for watch in (first, second, fourth):
        assert watch.loss is not None
        assert watch.loss.rank == 2
        assert watch.loss.text.startswith("process 2 of 4 (host2) died")
        assert watch.verdict(0) is watch.loss
    assert [watch.heir for watch in (first, second, fourth)] == [True, False, False]
    assert not any(watch.alone for watch in watches)


def test_where_the_first_process_is_lost_the_second_is_its_heir() -> None:
    first, second, third = ring(3)
    assert first.heir
    assert not second.heir
    close(first)
    listen(second, third)
    assert (second.heir, third.heir) == (True, False)


def test_a_silent_neighbor_is_lost_and_one_that_beats_is_not() -> None:
    first, second, _ = ring(3)
    for link in first._links:
        link.heard -= 9.0 if link.peer == 1 else 0
    first._look()
    assert first.loss is None
    second._tell({"at": second.counts})
    listen(first)
    first._look()
    assert first.loss is None
    next(link for link in first._links if link.peer == 1).heard -= 10.5
    first._look()
    assert first.loss is not None
    assert first.loss.text.startswith("process 1 of 3 (host1) has been silent for 10 s")


@pytest.mark.parametrize("later", [0.0, 1.5 * BEAT])
def test_a_process_that_hears_nobody_says_so_of_itself(later: float) -> None:
    _, second, _ = ring(3)
    for link, silent in zip(second._links, (10.1 + later, 10.1), strict=True):
        link.heard -= silent - later
    second._look()
    assert second.loss is None or second.loss.rank == 1
    for link in second._links:
        link.heard -= later
    second._look()
    assert second.loss is not None
    assert second.loss.text.startswith("process 1 of 3 (host1) has heard nothing from the others for 10 s")
    assert second.alone
    assert not second.heir  # the others save
    first = ring(3)[0]
    first.loss = LostRank(0, "cut off")
    assert first.heir  # it holds the run's folder


def test_of_two_each_counts_the_other_as_silent() -> None:
    first, _ = ring(2)
    for link in first._links:
        link.heard -= 11.0
    first._look()
    assert first.loss is not None
    assert first.loss.rank == 1


def test_a_process_that_was_itself_stopped_accuses_nobody() -> None:
    """All of them may have been, from a terminal: they go on together."""
    first, _ = ring(2)
    for link in first._links:
        link.heard -= 11.0
    first._looked -= 11.0
    first._look()
    assert first.loss is None
    for link in first._links:
        link.heard -= 11.0
    first._look()
    assert first.loss is not None


def test_who_was_stopped_for_long_still_notices_the_next_loss() -> None:
    """What it heard before it was stopped, and what it has read since, count from now on at most."""
    first, _ = ring(2)
    first._looked -= 3600.0
    first._look()
    assert first.loss is None
    for link in first._links:
        assert link.heard <= time.monotonic()
        link.heard -= 11.0
    first._look()
    assert first.loss is not None


def test_of_two_links_to_a_process_one_that_is_heard_will_do() -> None:
    for quiet in (0, 1):
        first, _ = ring(2)
        first._links[quiet].heard -= 11.0
        first._look()
        assert first.loss is None


def test_the_thread_ends_with_the_first_loss_it_sees() -> None:
    first, second = ring(2)
    ended = threading.Event()
    first._end = ended.set  # type: ignore[method-assign]
    thread = threading.Thread(target=first._run, daemon=True)
    thread.start()
    second._links[0].sock.settimeout(5)
    assert second._links[0].sock.recv(100).startswith(b'{"at": [0, 0]}')  # it beats
    assert not ended.is_set()
    close(second)
    assert ended.wait(5)
    thread.join(5)
    assert first.loss is not None


def test_who_is_done_with_the_others_is_not_ended_by_the_loss_of_one() -> None:
    """A script may export the model after training, for longer than another machine stays awake."""
    first, second = ring(2)
    ended = threading.Event()
    first._end = ended.set  # type: ignore[method-assign]
    first.done()
    thread = threading.Thread(target=first._run, daemon=True)
    thread.start()
    close(second)
    assert first.verdict(5) is not None
    assert not ended.wait(2 * BEAT / 4)
    with first.exchange():  # it needs the others again
        assert ended.wait(5)
    thread.join(5)


def test_a_goodbye_is_no_loss_unless_it_comes_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for failed, done, lost in [(False, False, False), (True, False, True), (True, True, False)]:
        first, second = ring(2)
        second._thread.start = second._thread.join = lambda *_: None  # type: ignore[method-assign]
        second.failed = failed
        if done:
            second.done()
        monkeypatch.delattr("sys.last_value", raising=False)
        second.leave()
        listen(first, first)
        assert (first.loss is not None) is lost
        assert first.loss is None or "ended before the others" in first.loss.text


def test_who_is_missing_in_an_exchange_is_known_from_the_beats(caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = ring(3)
    with first.exchange(), second.exchange():
        for watch in (first, second, third):
            watch._tell({"at": watch.counts})
        listen(first, second, third)
        assert first.missing() == second.missing() == [2]
        first._say_missing()
        assert not caplog.messages
        first._since = second._since = time.monotonic() - 1000
        first._say_missing()
        second._say_missing()
        first._say_missing()
    assert caplog.messages == ["waiting for process 2 of 3 (host2), which is alive but has not got this far, for 120 s"]
    with third.exchange():
        third._tell({"at": third.counts})
        listen(first)
    assert first.missing() == []


def test_a_loss_leaves_what_may_be_left_and_nothing_else() -> None:
    watch, _ = ring(2)

    def call() -> None:
        watch._called(signal.SIGUSR2, None)

    def lose_and_call() -> None:
        watch.loss = LostRank(1, "gone")
        call()

    with watch.keeps(), watch.interrupts():
        call()  # nobody is lost
    watch.loss = LostRank(1, "gone")
    call()  # nothing may be left yet: the process is ended after a while
    assert not watch._seen
    watch.loss = None
    with watch.keeps():
        with pytest.raises(Lost), watch.interrupts():
            lose_and_call()
        assert watch._mode == "kept"
        with pytest.raises(Lost), watch.interrupts():
            pytest.fail("begun though another process is lost")
    assert watch._mode == "away"


def test_a_script_s_own_handler_of_the_signal_still_hears_it() -> None:
    """A cluster's scheduler sends it before a job's time is over."""
    heard: list[int] = []
    former = signal.signal(CALL, lambda number, _: heard.append(number))
    watch, _ = ring(2)
    try:
        watch.start()
        signal.raise_signal(CALL)
        assert heard == [CALL]
        watch.loss = LostRank(1, "gone")
        watch._done = True  # so that nothing ends here
        signal.raise_signal(CALL)
        assert heard == [CALL]
    finally:
        signal.signal(CALL, former)
        watch.leave()


def test_from_hold_on_a_block_is_finished() -> None:
    watch, _ = ring(2)
    with watch.keeps(), watch.interrupts():
        watch.hold()
        watch.loss = LostRank(1, "gone")
        watch._called(signal.SIGUSR2, None)
        assert watch._seen


@pytest.mark.parametrize("size", [2, 3])
def test_processes_link_themselves_in_a_ring(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_HOSTFILE", raising=False)
    doors = [Door(rank, size) for rank in range(size)]
    known = [door.member._replace(addresses=("127.0.0.1",)) for door in doors]
    with ThreadPoolExecutor(size) as pool:
        made = list(pool.map(lambda door: door.links(known), doors))
    for rank, (links, wrong) in enumerate(made):
        assert wrong is None
        assert [link.peer for link in links] == [(rank + 1) % size, (rank - 1) % size]
        assert all(link.local for link in links)
        links[0].send({"at": [rank]})
    time.sleep(0.1)
    for rank, (links, _) in enumerate(made):
        assert links[1].read() == [{"at": [(rank - 1) % size]}]
        for link in links:
            link.close()


def test_a_stranger_does_not_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.backend.links.PATIENCE", 0.2)
    monkeypatch.setattr("grpo.backend.links.TRY", 0.2)
    doors = [Door(rank, 2) for rank in range(2)]
    known = [door.member._replace(addresses=("127.0.0.1",)) for door in doors]
    with socket.create_connection(("127.0.0.1", known[0].port)) as stranger:
        stranger.sendall(b"let me in\n")
        links, wrong = doors[0].links([known[0], known[1]._replace(secret="")])
        assert stranger.recv(10) == b""
    assert links == []
    assert wrong == f"{known[1].host} does not answer on port {known[1].port} of 127.0.0.1"
    doors[1]._listener.close()


def test_a_message_may_come_in_pieces() -> None:
    mine, theirs = pair(0, 1)
    theirs.sock.send(b'{"bye": tr')
    assert mine.read() == []
    theirs.sock.send(b'ue}\n{"at": [1]}\n')
    assert mine.read() == [{"bye": True}, {"at": [1]}]
    theirs.send({"at": [2]})
    theirs.send({"at": [3]})
    assert mine.read() == [{"at": [2]}, {"at": [3]}]
    theirs.close()
    with pytest.raises(OSError, match="closed"):
        mine.read()


def test_the_ring_of_mlx_is_cut_and_no_other_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        ringing = socket.create_connection(("127.0.0.1", port))
        accepted, _ = listener.accept()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = socket.create_connection(listener.getsockname())
        kept, _ = listener.accept()
    (tmp_path / "hosts").write_text(json.dumps([[f"127.0.0.1:{port}"], ["127.0.0.1:1"]]))
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    local, far = socket.socketpair()
    assert addresses(0)[0] == "127.0.0.1"
    cut_ring()
    assert ringing.recv(1) == accepted.recv(1) == b""
    for one, two in ((other, kept), (local, far)):
        one.send(b"x")
        assert two.recv(1) == b"x"
    for sock in (ringing, accepted, other, kept, local, far):
        sock.close()


@pytest.fixture
def local_pair() -> Iterator[tuple[Watch, Link]]:
    """A watch whose only neighbor, of this machine, has been silent for too long, and the link to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        mine = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with mine, theirs:
        link = Link(1, mine, heard=time.monotonic() - 11)
        here = [Member("host", 4711 + rank, machine(), (), 0, "") for rank in range(2)]
        yield Watch(0, here, [link], silence=10.0), link


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What is asked to end instead of being ended."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: asked.append((pid, number)))
    return asked


def test_a_process_of_another_machine_is_not_ended(ended: list[tuple[int, int]]) -> None:
    first, _ = ring(2)
    for link in first._links:
        link.heard -= 11.0
    first._look()
    assert first.loss is not None
    assert ended == []


def test_a_stopped_process_of_this_machine_is_ended(
    local_pair: tuple[Watch, Link], ended: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, _ = local_pair
    monkeypatch.setattr("grpo.backend.watch.is_running", lambda _pid: False)
    watch._look()
    assert ended == [(4712, signal.SIGKILL)]
    assert watch.loss is not None
    assert "was stopped (silent for 10 s), so grpo ended it" in watch.loss.text


def test_a_silent_process_of_this_machine_that_runs_is_waited_for(
    local_pair: tuple[Watch, Link],
    ended: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A long call of other people's code may hold Python's lock, and no thread of the process beats then."""
    watch, link = local_pair
    running = {4712}
    monkeypatch.setattr("grpo.backend.watch.is_running", running.__contains__)
    for _ in range(2):
        link.heard = time.monotonic() - 11
        watch._look()
        assert watch.loss is None
        assert time.monotonic() - link.heard < 5
    assert ended == []
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "process 1 of 2 (host) has been silent for 10 s, but still runs" in said[0]
    running.clear()  # stopped meanwhile
    link.heard -= 11
    watch._look()
    assert watch.loss is not None


def test_whether_a_process_runs() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert is_running(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert not is_running(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_running(process.pid)  # dead, and not yet asked after
    assert not is_running(process.pid)


@pytest.mark.parametrize("said", ["soon", "0", "2.9", "nan", "inf"])
def test_a_silence_that_is_none_is_a_mistake(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("GRPO_RANK_SILENCE", said)
    with pytest.raises(UserError, match=f"GRPO_RANK_SILENCE: '{said}' is not a number of seconds that is at least 3"):
        silence()
