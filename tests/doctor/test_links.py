"""`grpo doctor --ranks`: the mistakes of hostfiles, and what is found of the processes' links."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from launching import LAUNCH, launch

from grpo.backend.ranks import Ranks
from grpo.doctor import ranks as of_ranks
from grpo.doctor.hostfile import hostfile
from grpo.doctor.ranks import heard, pairs, shared_folder, who


def host(rank: int, **changes: Any) -> dict[str, Any]:
    described = {"ssh": f"mac{rank}.local", "ips": [f"10.0.0.{rank + 1}"], **changes}
    return {name: value for name, value in described.items() if value is not None}


def found(tmp_path: Path, written: Any, ssh=lambda _: None):
    path = tmp_path / "hosts.json"
    path.write_text(written if isinstance(written, str) else json.dumps(written))
    return hostfile(path, ssh)


def test_a_sound_hostfile_says_who_starts_what(tmp_path: Path) -> None:
    asked: list[str] = []
    hosts = [host(0, ssh="127.0.0.1"), host(1), host(1)]
    finding = found(tmp_path, {"backend": "ring", "envs": ["A=1"], "hosts": hosts}, asked.append)
    assert (finding.status, finding.remedy) == ("ok", "")
    assert finding.text.endswith("hosts.json: 3 processes on 127.0.0.1, mac1.local")
    assert asked == ["mac1.local"]  # this machine needs no ssh, and each other is asked once
    assert found(tmp_path, [host(0)]).text.endswith("1 process on mac0.local")
    jaccl = [host(0, rdma=[None, "rdma_en2"]), host(1, rdma=["rdma_en2", None], ips=None)]
    assert found(tmp_path, {"backend": "jaccl", "hosts": jaccl}).status == "ok"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{hosts: []}", "is not JSON: Expecting property name enclosed in double quotes: line 1 column 2"),
        ({"host": [host(0)]}, "expected a list of hosts, or an object with such a list under `hosts`"),
        ([], "expected a list of hosts"),
        (["mac0.local"], "expected a list of hosts"),
        ({"hosts": [host(0)], "backends": "ring"}, "the file: 'backends' is unknown. Did you mean 'backend'?"),
        ({"hosts": [host(0)], "backend": "rings"}, "backend 'rings' is not one of ring, mpi, nccl, jaccl, jaccl-ring"),
        ({"hosts": [host(0)], "envs": {"A": 1}}, "envs must be a list"),
        ([host(0), host(1, ssh=None)], "host 1 has no `ssh`"),
        ([host(0), host(1, ips=None, ip="10.0.0.2")], "host 1: 'ip' is unknown. Did you mean 'ips'?"),
        ([host(0), host(1, ips=None)], "host 1 has no `ips`"),
        ({"hosts": [host(0, ips=[]), host(1)], "backend": "nccl"}, "host 0 has no `ips`"),
        ([host(0), host(1, ips="10.0.0.2")], "host 1: `ips` must be a list"),
        ([host(0), host(1, ips=["mac1.local"])], "host 1: 'mac1.local' is not an IP address"),
        ([host(0), host(1, ips=["127.0.0.1"])], "host 1: on every machine, 127.0.0.1 means that machine itself"),
        ({"hosts": [host(0, rdma=[None, "a"]), host(1)], "backend": "jaccl"}, "host 1: `rdma` must have 2 entries"),
        (
            {"hosts": [host(0, rdma=["a", None]), host(1, rdma=["a", None])], "backend": "jaccl-ring"},
            "host 0: `rdma` must be null at the host's own place, 0",
        ),
    ],
)
def test_each_mistake_of_a_hostfile_is_said(tmp_path: Path, written: Any, said: str) -> None:
    finding = found(tmp_path, written)
    assert finding.status == "fail"
    assert said in finding.text
    assert finding.remedy


def test_what_is_only_for_one_machine_is_no_mistake_on_one(tmp_path: Path) -> None:
    assert found(tmp_path, [host(0, ips=["127.0.0.1"]), host(0, ips=["127.0.0.1"])]).status == "ok"
    assert found(tmp_path, {"backend": "nccl", "hosts": [host(0), host(1, ips=[])]}).status == "ok"


def test_hosts_that_cannot_be_logged_in_to_are_named(tmp_path: Path) -> None:
    finding = found(tmp_path, [host(0), host(1)], {"mac0.local": None, "mac1.local": "Permission denied"}.get)
    assert finding.status == "fail"
    assert finding.text.endswith("cannot log in to mac1.local: Permission denied")
    assert hostfile(tmp_path / "none.json").text.endswith("none.json: No such file or directory")


class Several(Ranks):
    """The first of several processes, the others' answers given."""

    def __init__(self, *others: Any) -> None:
        super().__init__()
        self.size, self._others = 1 + len(others), others

    def gather(self, mine: Any) -> list[Any]:
        return [mine, *(mine if other is Ellipsis else other for other in self._others)]


def test_processes_of_other_versions_are_named() -> None:
    name = socket.gethostname()
    assert who(Several(...)).text == f"2 on 1 machine: {name} × 2"
    finding = who(Several(..., ("other", {"mlx": "0.1"})))
    assert finding.status == "fail"
    assert "process 2 (other) has" in finding.text


def test_a_folder_that_another_process_does_not_see_is_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shared_folder(Several(...)).status == "ok"
    finding = shared_folder(Several(..., False))
    assert (finding.status, finding.text) == ("warn", f"process 2 does not see {tmp_path} of process 0")
    assert list(tmp_path.iterdir()) == []


def test_without_links_the_long_wait_is_said() -> None:
    finding = heard(Several(...))
    assert finding.status == "warn"
    assert "only after 1800 s" in finding.text


@pytest.mark.parametrize(
    ("delays", "rates", "status", "said"),
    [
        ([1e-4] * 3, [2**30] * 3, "ok", "0↔1 100 µs 1.00 GB/s, 1↔2 100 µs 1.00 GB/s, 2↔0 100 µs 1.00 GB/s"),
        ([1e-4, 4e-3, 1e-4], [2**30] * 3, "warn", "1↔2 4.0 ms 1.00 GB/s"),
        ([1e-4] * 3, [2**30, 2**27, 2**30], "warn", "1↔2 100 µs 128 MB/s, 2↔0 100 µs 1.00 GB/s: the slowest link"),
    ],
)
def test_slow_links_are_said(monkeypatch, delays, rates, status: str, said: str) -> None:
    monkeypatch.setattr(of_ranks, "ring_of", lambda: [["a"], ["b"], ["c"]])

    def bounced(_ranks, one: int, _other: int, size: int, _times: int) -> float:
        return delays[one] if size == 8 else size / rates[one]

    monkeypatch.setattr(of_ranks, "_bounced", bounced)
    finding = pairs(Several(..., ...))
    assert finding.status == status
    assert said in finding.text
    assert bool(finding.remedy) == (status != "ok")


@pytest.mark.parametrize(("other", "remedy"), [(..., "check what else runs on this machine"), ("far", "not Wi-Fi")])
def test_a_link_within_a_machine_is_not_told_of_cables(monkeypatch, other: Any, remedy: str) -> None:
    monkeypatch.setattr(of_ranks, "ring_of", lambda: [["a"], ["b"]])
    monkeypatch.setattr(of_ranks, "_bounced", lambda *_: 0.01)
    assert remedy in pairs(Several(other)).remedy


def test_one_process_has_no_links(run_cli) -> None:
    ran = run_cli("doctor", "--ranks")
    assert ran.code == 2
    assert "measures the links between several processes, but this is a single process" in ran.err
    assert run_cli("doctor", "--hostfile", "hosts.json").code == 2
    assert run_cli("doctor", "--ranks", "--hostfile", "hosts.json").code == 1


@pytest.mark.slow
@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside this Python")
def test_two_processes_try_their_links_and_one_tells() -> None:
    ran = launch(2, "-c", "from grpo.cli import main; main()", "doctor", "--ranks", "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = json.loads(ran.stdout)
    assert told["ok"]
    findings = {finding["name"]: finding["text"] for finding in told["findings"]}
    assert list(findings) == ["processes", "heartbeats", "folder", "links", "sums"]
    assert findings["links"].startswith("0↔1 ")
    assert " 64 MB " in findings["sums"]
    assert "is noticed within 30 s" in findings["heartbeats"]
