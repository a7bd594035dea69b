"""Checks a hostfile of `mlx.launch`: each mistake comes with what to write instead."""

from __future__ import annotations

import ipaddress
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.doctor.finding import Finding
from grpo.errors import did_you_mean

KEYS, HOST_KEYS = ("backend", "envs", "hosts"), ("ssh", "ips", "rdma")
BACKENDS = ("ring", "mpi", "nccl", "jaccl", "jaccl-ring")
HERE = "127.0.0.1"
"""The only host on which `mlx.launch` starts processes without ssh."""
SSH_SECONDS = 5
EXAMPLE = '{"hosts": [{"ssh": "a.local", "ips": ["192.168.0.1"]}, {"ssh": "b.local", "ips": ["192.168.0.2"]}]}'

Ssh = Callable[[str], str | None]
"""Returns why a login to a host without a password fails; None if it works."""


def why_no_ssh(host: str) -> str | None:
    """Log in to a host as `mlx.launch` does, but without a terminal that could ask for a password."""
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}", host, "true"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3 * SSH_SECONDS)
    except FileNotFoundError:
        return "ssh is not installed here"
    except subprocess.TimeoutExpired:
        return f"no answer in {3 * SSH_SECONDS} s"
    said = ran.stderr.strip().splitlines()
    return None if ran.returncode == 0 else (said[-1] if said else f"ssh ended with {ran.returncode}")


def hostfile(path: Path, ssh: Ssh = why_no_ssh) -> Finding:
    """Check a hostfile: report its mistakes, or how many processes it starts on which hosts."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return Finding("hostfile", "fail", f"{path}: {error.strerror}", f"create it, for example {EXAMPLE}")
    except ValueError as error:
        return Finding("hostfile", "fail", f"{path} is not JSON: {error}", f"for example {EXAMPLE}")
    hosts = written.get("hosts") if isinstance(written, dict) else written
    if not isinstance(hosts, list) or not hosts or not all(isinstance(host, dict) for host in hosts):
        text = f"{path}: expected a list of hosts, or an object with such a list under `hosts`"
        return Finding("hostfile", "fail", text, f"for example {EXAMPLE}")
    about = written if isinstance(written, dict) else {}
    if mistakes := [*_of_file(about), *_of_hosts(hosts, about.get("backend") or "ring")]:
        return Finding("hostfile", "fail", f"{path}: {'; '.join(mistakes)}", "fix the file, and run this check again")
    names = dict.fromkeys(host["ssh"] for host in hosts)
    if closed := [f"{name}: {why}" for name in names if name != HERE and (why := ssh(name)) is not None]:
        remedy = f"make `ssh HOST true` work without a password (ssh-copy-id); for this machine, write {HERE}"
        return Finding("hostfile", "fail", f"{path}: cannot log in to {'; '.join(closed)}", remedy)
    processes = f"{len(hosts)} process{'es' if len(hosts) > 1 else ''}"
    return Finding("hostfile", "ok", f"{path}: {processes} on {', '.join(names)}")


def _of_file(about: Mapping[str, Any]) -> Iterator[str]:
    """Yield the mistakes outside the list of hosts."""
    yield from _unknown(about, KEYS, "the file")
    backend, envs = about.get("backend") or "ring", about.get("envs", [])
    if backend not in BACKENDS:
        known = ", ".join(BACKENDS)
        yield f"backend {backend!r} is not one of {known}.{did_you_mean(str(backend), BACKENDS)}"
    if not isinstance(envs, list) or not all(isinstance(env, str) and "=" in env for env in envs):
        yield 'envs must be a list such as ["MLX_METAL_FAST_SYNCH=1"]'


def _of_hosts(hosts: Sequence[Mapping[str, Any]], backend: str) -> Iterator[str]:
    several = len({str(host.get("ssh")) for host in hosts}) > 1
    for rank, host in enumerate(hosts):
        where = f"host {rank}"
        yield from _unknown(host, HOST_KEYS, where)
        if not isinstance(host.get("ssh"), str) or not host["ssh"]:
            yield f"{where} has no `ssh`, the name for the login ({HERE} for this machine)"
        ips = host.get("ips", [])
        if not isinstance(ips, list):
            yield f"{where}: `ips` must be a list"
            continue
        if not ips and (backend == "ring" or (rank == 0 and backend != "mpi")):
            yield f"{where} has no `ips`, the addresses at which the other hosts reach it"
        for ip in ips:
            yield from (f"{where}: {wrong}" for wrong in _of_address(str(ip), several))
        if backend.startswith("jaccl"):
            yield from _of_devices(rank, host.get("rdma"), len(hosts))


def _of_address(ip: str, several: bool) -> Iterator[str]:
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        yield f"{ip!r} is not an IP address; `ips` takes numbers such as 192.168.0.1, not names"
        return
    if several and (address.is_loopback or address.is_unspecified):
        yield f"on every machine, {ip} means that machine itself: write the address at which the others reach it"


def _of_devices(rank: int, devices: Any, size: int) -> Iterator[str]:
    """Yield the mistakes in a host's row of JACCL's device table."""
    if not isinstance(devices, list) or len(devices) != size:
        yield f"host {rank}: `rdma` must have {size} entries, one per host"
    elif devices[rank] is not None:
        yield f"host {rank}: `rdma` must be null at the host's own place, {rank}"


def _unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> Iterator[str]:
    for name in given:
        if name not in known:
            yield f"{where}: {name!r} is unknown.{did_you_mean(name, known)}".removesuffix(".")
