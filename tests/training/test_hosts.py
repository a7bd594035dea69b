"""Two hosts: network namespaces joined by a cable of their own, connected by the ring backend's host file."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PATIENCE = 4
WORKER = """
import grpo, sys
from pathlib import Path
from grpo.backend.ranks import Ranks
ranks = Ranks.launched()
while True:
    ranks.wait()
    Path(sys.argv[1], f"heard-{ranks.rank}").touch()
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """The names of two namespaces with the addresses 10.213.0.1 and .2."""
    names = f"grpo-a-{os.getpid()}", f"grpo-b-{os.getpid()}"
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.213.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    finally:
        for name in made:
            ip("netns", "del", name)


def start(rank: int, host: str, folder: Path) -> subprocess.Popen[str]:
    addresses = folder / "hosts.json"
    addresses.write_text(json.dumps([["10.213.0.1:9813"], ["10.213.0.2:9814"]]))
    settings = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(addresses), "GRPO_RANK_TIMEOUT": str(PATIENCE)}
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-c", WORKER, str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings, "PYTHONPATH": str(HERE.parents[1])},
    )


def started(hosts: tuple[str, str], folder: Path) -> list[subprocess.Popen[str]]:
    ranks = [start(rank, host, folder) for rank, host in enumerate(hosts)]
    deadline = time.monotonic() + 60
    while not all((folder / f"heard-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return ranks


def ended(rank: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what it said, well before a test's own patience ends."""
    try:
        _, said = rank.communicate(timeout=10 * PATIENCE)
    finally:
        rank.kill()
    return rank.returncode, said


@pytest.mark.slow
def test_a_cut_link_ends_both_hosts_in_bounded_time(hosts, tmp_path) -> None:
    ranks = started(hosts, tmp_path)
    ip("-n", hosts[0], "link", "set", "cable", "down")
    for number, rank in enumerate(ranks):
        code, said = ended(rank)
        assert code == 1
        assert f"process {number} of 2: nothing from the others for {PATIENCE} s" in said


def test_a_process_that_is_killed_ends_the_one_on_the_other_host(hosts, tmp_path) -> None:
    first, second = started(hosts, tmp_path)
    second.kill()
    second.communicate()
    code, said = ended(first)
    assert code == 1
    assert f"process 1 of 2 ({socket.gethostname()}) died" in said


@pytest.mark.slow
def test_a_host_that_never_comes_is_not_waited_for_for_ever(hosts, tmp_path) -> None:
    code, said = ended(start(0, hosts[0], tmp_path))
    assert code == -9
    assert f"process 0 waited {PATIENCE} s for the others to start" in said
