"""Checks of the processes that `mlx.launch` has started: where they run, and how fast their links are."""

from __future__ import annotations

import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from grpo.backend.links import machine, ring_of
from grpo.backend.ranks import Ranks
from grpo.backend.versions import versions
from grpo.doctor.finding import Finding

SIZES = ((8, 30), (2**16, 10), (2**20, 5), (2**24, 3), (2**26, 3))
"""Sizes of an exchange in bytes, each with its number of repetitions; the median counts."""
LONG = 2.0
"""If an exchange takes more than this many seconds, no larger size is measured."""
SLOW_MS = 2.0
"""Latency in milliseconds above which a link is too slow to be a cable."""
UNEVEN = 4.0
"""Maximum ratio between the speeds of the fastest and the slowest link."""
PAIRS = 16
"""Maximum number of links that are measured one by one."""


def checks_of(ranks: Ranks) -> tuple[Callable[[], Finding], ...]:
    """Return the checks of several processes. All processes must run all of them in this order."""

    def processes() -> Finding:
        return who(ranks)

    def heartbeats() -> Finding:
        return heard(ranks)

    def folder() -> Finding:
        return shared_folder(ranks)

    def links() -> Finding:
        return pairs(ranks)

    def sums() -> Finding:
        return exchanged(ranks)

    return processes, heartbeats, folder, links, sums


def who(ranks: Ranks) -> Finding:
    """Check where the processes run, and whether they have the same versions."""
    everyone = ranks.gather((socket.gethostname(), versions()))
    hosts = Counter(host for host, _ in everyone)
    text = f"{ranks.size} on {len(hosts)} machine{'s' if len(hosts) > 1 else ''}: " + ", ".join(
        f"{host} × {count}" if count > 1 else host for host, count in hosts.items()
    )
    first = everyone[0][1]
    for rank, (host, theirs) in enumerate(everyone):
        if other := [name for name, version in first.items() if theirs.get(name) != version]:
            name = other[0]
            wrong = f"process {rank} ({host}) has {name} {theirs.get(name)}, but process 0 has {first[name]}"
            return Finding("processes", "fail", f"{text}; {wrong}", "install the same versions on all machines")
    return Finding("processes", "ok", text)


def heard(ranks: Ranks) -> Finding:
    """Check whether the processes notice the loss of another process."""
    if ranks.watch is not None:
        return Finding("heartbeats", "ok", f"the loss of a process is noticed within {ranks.watch.silence:.0f} s")
    text = f"the processes cannot connect, so the loss of a process may be noticed only after {ranks.patience:.0f} s"
    return Finding("heartbeats", "warn", text, "allow connections between the machines on all ports in the firewall")


def shared_folder(ranks: Ranks) -> Finding:
    """Check whether all processes see the working folder of process 0."""
    mark = ranks.gather(Path(f".grpo-doctor-{secrets.token_hex(4)}").absolute())[0]
    if ranks.first:
        mark.touch()
    ranks.wait()
    seen = ranks.gather(mark.exists())
    if ranks.first:
        mark.unlink()
    if blind := [rank for rank, sees in enumerate(seen) if not sees]:
        text = f"process {blind[0]} does not see {mark.parent} of process 0"
        return Finding("folder", "warn", text, "put output_dir and the recipe on a file system that all machines share")
    return Finding("folder", "ok", f"all see {mark.parent}")


def pairs(ranks: Ranks) -> Finding:
    """Measure the latency and bandwidth of each link of the ring, in both directions."""
    if not ring_of():
        return Finding("links", "ok", "not measured one by one: MLX does not connect these processes in a ring")
    found = {}
    for one in range(min(ranks.size if ranks.size > 2 else 1, PAIRS)):
        other = (one + 1) % ranks.size
        delay = _bounced(ranks, one, other, 8, 20)
        took = _bounced(ranks, one, other, 2**20, 3)
        took = _bounced(ranks, one, other, 2**24, 2) if took < LONG / 16 else took * 16
        found[f"{one}↔{other}"] = delay, 2**24 / took
    text = ", ".join(f"{name} {_time(delay)} {_rate(rate)}" for name, (delay, rate) in found.items())
    slowest, fastest = min(rate for _, rate in found.values()), max(rate for _, rate in found.values())
    if max(delay for delay, _ in found.values()) > SLOW_MS / 1000:
        one = len(set(ranks.gather(machine()))) == 1
        busy, wireless = "check what else runs on this machine", "use a cable (Thunderbolt, Ethernet), not Wi-Fi"
        return Finding("links", "warn", f"{text}: high latency", busy if one else wireless)
    if fastest > UNEVEN * slowest:
        return Finding("links", "warn", f"{text}: the slowest link delays all", "check its cable and its address")
    return Finding("links", "ok", text)


def exchanged(ranks: Ranks) -> Finding:
    """Measure a sum over all processes by its size in bytes. Gradients are summed like this once per update."""
    import mlx.core as mx

    said = []
    for size, times in SIZES:
        array = mx.zeros(size // 4)
        mx.eval(array)
        took = _median(ranks, lambda array=array: ranks.sum([array]), times)  # type: ignore[misc]
        rate = f" ({_rate(size / took)})" if size > 2**16 else ""
        said.append(f"{_bytes(size)} {_time(took)}{rate}")
        if took > LONG:
            break
    return Finding("sums", "ok", f"over all {ranks.size} processes: {', '.join(said)}")


def _bounced(ranks: Ranks, one: int, other: int, size: int, times: int) -> float:
    """Return the seconds that `size` bytes take from one process to another: half of a round trip."""

    def there_and_back() -> None:
        ranks.passed(size, one, other)
        ranks.passed(size, other, one)

    return _median(ranks, there_and_back if ranks.rank in (one, other) else lambda: None, times, by=one) / 2


def _median(ranks: Ranks, work: Callable[[], object], times: int, by: int = 0) -> float:
    """Return the median seconds of `work` in the process `by`, after a warm-up run."""
    seconds = []
    for _ in range(times + 1):
        ranks.wait()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return float(ranks.gather(sorted(seconds[1:])[times // 2])[by])


def _bytes(size: int) -> str:
    for unit, of in (("MB", 2**20), ("kB", 2**10)):
        if size >= of:
            return f"{size // of} {unit}"
    return f"{size} B"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:,.1f} ms"


def _rate(rate: float) -> str:
    return f"{rate / 2**30:.2f} GB/s" if rate >= 2**30 else f"{rate / 2**20:.0f} MB/s"
