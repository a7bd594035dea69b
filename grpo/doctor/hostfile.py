"""A hostfile of `mlx.launch`: the mistakes in it, each with what to write instead."""

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
"""The only name that `mlx.launch` starts processes under without ssh."""
SSH_SECONDS = 5
EXAMPLE = '{"hosts": [{"ssh": "a.local", "ips": ["192.168.0.1"]}, {"ssh": "b.local", "ips": ["192.168.0.2"]}]}'

Ssh = Callable[[str], str | None]
"""Why a host cannot be logged in to without a password; None if it can."""


def why_no_ssh(host: str) -> str | None:
    """Log in to a host as `mlx.launch` will, but without a terminal to ask for a password."""
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
    """What is wrong with a hostfile, or how many processes it starts where."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return Finding("hostfile", "fail", f"{path}: {error.strerror}", f"write one: {EXAMPLE}")
    except ValueError as error:
        return Finding("hostfile", "fail", f"{path} is not JSON: {error}", f"such as {EXAMPLE}")
    hosts = written.get("hosts") if isinstance(written, dict) else written
    if not isinstance(hosts, list) or not hosts or not all(isinstance(host, dict) for host in hosts):
        text = f"{path}: expected a list of hosts, or an object with such a list under `hosts`"
        return Finding("hostfile", "fail", text, f"such as {EXAMPLE}")
    about = written if isinstance(written, dict) else {}
    if mistakes := [*_of_file(about), *_of_hosts(hosts, about.get("backend") or "ring")]:
        return Finding("hostfile", "fail", f"{path}: {'; '.join(mistakes)}", "mend it, and ask again")
    names = dict.fromkeys(host["ssh"] for host in hosts)
    if closed := [f"{name}: {why}" for name in names if name != HERE and (why := ssh(name)) is not None]:
        remedy = f"let `ssh HOST true` work without a password (ssh-copy-id); this machine itself is {HERE}"
        return Finding("hostfile", "fail", f"{path}: cannot log in to {'; '.join(closed)}", remedy)
    processes = f"{len(hosts)} process{'es' if len(hosts) > 1 else ''}"
    return Finding("hostfile", "ok", f"{path}: {processes} on {', '.join(names)}")


def _of_file(about: Mapping[str, Any]) -> Iterator[str]:
    """Mistakes beside the hosts."""
    yield from _unknown(about, KEYS, "the file")
    backend, envs = about.get("backend") or "ring", about.get("envs", [])
    if backend not in BACKENDS:
        known = ", ".join(BACKENDS)
        yield f"backend {backend!r} is none of {known}.{did_you_mean(str(backend), BACKENDS)}"
    if not isinstance(envs, list) or not all(isinstance(env, str) and "=" in env for env in envs):
        yield 'envs is to be a list such as ["MLX_METAL_FAST_SYNCH=1"]'


def _of_hosts(hosts: Sequence[Mapping[str, Any]], backend: str) -> Iterator[str]:
    several = len({str(host.get("ssh")) for host in hosts}) > 1
    for rank, host in enumerate(hosts):
        where = f"host {rank}"
        yield from _unknown(host, HOST_KEYS, where)
        if not isinstance(host.get("ssh"), str) or not host["ssh"]:
            yield f"{where} has no `ssh`, the name to log in by ({HERE} for this machine)"
        ips = host.get("ips", [])
        if not isinstance(ips, list):
            yield f"{where}: `ips` is to be a list"
            continue
        if not ips and (backend == "ring" or (rank == 0 and backend != "mpi")):
            yield f"{where} has no `ips`, the addresses by which the others reach it"
        for ip in ips:
            yield from (f"{where}: {wrong}" for wrong in _of_address(str(ip), several))
        if backend.startswith("jaccl"):
            yield from _of_devices(rank, host.get("rdma"), len(hosts))


def _of_address(ip: str, several: bool) -> Iterator[str]:
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        yield f"{ip!r} is no address; `ips` takes numbers such as 192.168.0.1, not names"
        return
    if several and (address.is_loopback or address.is_unspecified):
        yield f"{ip} means this machine on every machine: give the address that the others reach it by"


def _of_devices(rank: int, devices: Any, size: int) -> Iterator[str]:
    """Mistakes in a row of the table of devices that JACCL needs."""
    if not isinstance(devices, list) or len(devices) != size:
        yield f"host {rank}: `rdma` is to have {size} entries, one for each host"
    elif devices[rank] is not None:
        yield f"host {rank}: `rdma` is to be null in its own place, {rank}"


def _unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> Iterator[str]:
    for name in given:
        if name not in known:
            yield f"{where}: {name!r} is unknown.{did_you_mean(name, known)}".removesuffix(".")
