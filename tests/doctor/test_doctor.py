"""What `grpo doctor` finds where something is wrong, each time with a remedy, and that it tells no secret."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlx.core as mx
import pytest

from grpo.doctor import agreement, machine, packages, places, services
from grpo.doctor.checks import CHECKS, examine, report
from grpo.doctor.finding import Finding
from grpo.doctor.machine import Device, MatrixProducts
from grpo.errors import UserError

ROOT = Path(__file__).parents[2]
SOUND = {"python": "3.11.7", "mlx": "0.32.4", "mlx-lm": "0.32.2", "mlx-cpu": "0.32.4"}
GB = 2**30


def has(finding: Finding, status: str, *said: str) -> None:
    assert finding.status == status, finding
    assert all(word in finding.line() for word in said), finding
    assert bool(finding.remedy) == (status != "ok")


def installed(**changes: str | None) -> Callable[[], dict[str, str]]:
    found = {**SOUND, **{name.replace("_", "-"): version for name, version in changes.items()}}
    return lambda: {name: version for name, version in found.items() if version is not None}


def test_every_check_has_a_name_of_its_own_and_says_it() -> None:
    names = [check.__name__.replace("_", " ") for check in CHECKS]
    assert len(set(names)) == len(names)
    answers = {"hub": lambda: services.hub(offline=True), "parity": lambda: Finding("parity", "ok", "see below")}
    assert [answers.get(name, check)().name for name, check in zip(names, CHECKS, strict=True)] == names


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, "ok", "mlx 0.32.4"),
        ({"mlx": "0.31.9"}, "fail", "mlx 0.31.9: mx.fast.rope is wrong for batched decoding"),
        ({"mlx": "0.32.1.dev20260101+abc"}, "fail", "'mlx>=0.32.2'"),
        ({"mlx": "0.32.2"}, "ok", "mlx 0.32.2"),
        ({"mlx": "0.32.9"}, "ok", "mlx 0.32.9"),
        ({"mlx": "0.33.0"}, "warn", "mlx 0.33.0: grpo was tested below 0.33"),
        ({"mlx_lm": "1.0"}, "warn", "pip install 'mlx-lm<0.33,>=0.32'"),
        ({"mlx_lm": "0.31.3"}, "fail", "'mlx-lm>=0.32'"),
        ({"mlx_lm": None}, "fail", "not installed: mlx-lm"),
    ],
)
def test_versions_that_do_not_do_are_named(changes: dict, status: str, said: str) -> None:
    bounds = {"mlx": "<0.33,>=0.32.2", "mlx-lm": "<0.33,>=0.32", "numpy": ""}
    has(packages.versions(installed(**changes), required=lambda: bounds), status, said)


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, "ok", "mlx-cpu 0.32.4"),
        ({"mlx_cuda_13": "0.32.4"}, "fail", "mlx-cpu 0.32.4 and mlx-cuda-13 0.32.4 are installed over each other"),
        ({"mlx_cuda_12": "0.32.4"}, "fail", "pip uninstall -y mlx mlx-cpu mlx-cuda-12"),
        ({"mlx_cpu": "0.32.2"}, "fail", "mlx-cpu 0.32.2 is not of the version of mlx, 0.32.4"),
        ({"mlx_cpu": None}, "warn", "built from source"),
        ({"mlx_cpu": None, "mlx_metal": "0.32.4"}, "ok", "mlx-metal 0.32.4"),
    ],
)
def test_one_package_brings_mlx(changes: dict, status: str, said: str) -> None:
    has(packages.backends(installed(**changes)), status, said)


@pytest.mark.parametrize(
    ("here", "status", "said"),
    [
        (Device("cpu", "Xeon", 24 * GB, 2), "ok", "cpu: Xeon, 24.0 GB, 2 CPU cores"),
        (Device("cpu", "Xeon", 24 * GB, 2, nvidia=True), "warn", "there is an NVIDIA driver, and MLX is not built"),
        (Device("cpu", "Xeon", 24 * GB, 2, nvidia=True, cuda_build=True), "warn", "sees no GPU"),
        (Device("cuda", "H200", 140 * GB, 16, nvidia=True, cuda_build=True), "ok", "cuda: H200, 140.0 GB"),
    ],
)
def test_a_gpu_that_is_not_used_is_noticed(here: Device, status: str, said: str) -> None:
    has(machine.device(lambda: here), status, said)


def test_the_wired_limit_is_metals() -> None:
    def mac(working_set: int) -> Callable[[], Device]:
        return lambda: Device("metal", "M3", 32 * GB, 8, working_set)

    def refuse(_: int) -> None:
        raise ValueError("not supported")

    wired: list[int] = []
    has(machine.wired_limit(mac(24 * GB), wired.append), "ok", "24.0 GB of 32.0 GB")
    assert wired == [24 * GB]
    has(machine.wired_limit(mac(16 * GB), wired.append), "warn", "sudo sysctl iogpu.wired_limit_mb=24576")
    has(machine.wired_limit(mac(24 * GB), refuse), "warn", "not supported", "macOS 15")
    has(machine.wired_limit(lambda: Device("cpu", "Xeon", GB, 1), refuse), "ok", "only Metal")


def test_the_wheels_slow_blas_is_noticed() -> None:
    has(machine.blas(lambda: MatrixProducts("MKL (libmkl_rt.so.3)", True, 120.0)), "ok", "MKL", "120 GFLOP/s")
    has(
        machine.blas(lambda: MatrixProducts("the one in MLX's wheel", False, 5.2)), "warn", "5 GFLOP/s", "grpo-mlx[cpu]"
    )
    has(
        machine.blas(lambda: MatrixProducts("MKL (libmkl_rt.so.3)", True, 5.2)), "warn", "5 GFLOP/s: slow"
    )  # it serves nobody
    assert machine.product_gflops(1) > 0


def test_a_missing_compiler_is_said_and_costs_nothing(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    has(machine.compiler(lambda: False), "ok", "no g++", "grpo needs none")
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    has(machine.compiler(lambda: False), "ok", str(tmp_path / "g++"))


def test_a_sandbox_that_cannot_be_built_is_noticed() -> None:
    has(machine.sandbox(lambda: None), "ok")
    has(machine.sandbox(lambda: "unshare: Operation not permitted"), "warn", "not permitted", "unsafe: true")


def test_decoding_agrees_with_teacher_forcing_on_this_machine() -> None:
    has(agreement.parity(), "ok", "joined layers", "mlx-lm's batch caches", "mean gap")


def test_rope_that_puts_all_rows_at_one_position_is_noticed(monkeypatch) -> None:
    """As MLX had it in batched decoding: every row at the first one's offset."""
    rope = mx.fast.rope

    def wrong(x, *args, offset=0, **kwargs):
        return rope(x, *args, offset=offset[0] if isinstance(offset, mx.array) and offset.ndim else offset, **kwargs)

    monkeypatch.setattr(mx.fast, "rope", wrong)
    has(agreement.parity(), "fail", "do not compute the same model", "reinstall MLX")


def test_a_gap_beyond_the_bound_is_noticed() -> None:
    def apart():
        policy, engine = agreement.toy()
        logprobs = policy.group_logprobs

        def shifted(*args):
            found, *entropies = logprobs(*args)
            return found + 2e-3, *entropies

        policy.group_logprobs = shifted
        return policy, engine

    has(agreement.parity(apart), "fail", "mean gap 2.0e-03", "bound on the mean 1e-03")


def test_recipes_are_read(tmp_path: Path) -> None:
    has(places.recipes(mine=tmp_path), "ok", "bundled in")
    has(places.recipes(ours=tmp_path), "fail", "no bundled recipe")
    (tmp_path / "mine.yaml").write_text("modle: {name: x}\n")
    has(places.recipes(mine=tmp_path), "warn", "mine.yaml", "cannot be read")
    has(places.recipes(ours=tmp_path), "fail", "a bundled recipe cannot be read")


@pytest.mark.parametrize("check", [places.runs_folder, places.grpo_cache, places.hub_cache])
def test_folders_that_cannot_be_written_or_are_full_are_noticed(check, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    has(check(tmp_path / "file/below"), "fail", "cannot be written", "file/below")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/weights").write_bytes(bytes(GB // 10))
    has(check(tmp_path / "there", free=lambda _: 99 * GB), "ok", "holds 0.1 GB, 99.0 GB free")
    has(check(tmp_path / "there", free=lambda _: GB // 5), "warn", "little", "make room")
    has(check(tmp_path / "there", free=lambda _: 0), "fail", "full", "make room")
    has(check(tmp_path / "not/yet", free=lambda _: 99 * GB), "ok", "not there yet")
    assert not (tmp_path / "not").exists()
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["weights"]


def test_offline_a_cache_need_only_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    has(places.hub_cache(tmp_path / "file/below", offline=True), "warn", "offline it is only read")


class _Answers(BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("status", "found"), [(200, "ok"), (404, "ok"), (503, "warn")])
def test_a_hub_that_answers(status: int, found: str, monkeypatch) -> None:
    monkeypatch.setattr(_Answers, "status", status)
    with HTTPServer(("127.0.0.1", 0), _Answers) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        has(services.hub(f"http://127.0.0.1:{server.server_port}", offline=False), found, "127.0.0.1")


def test_a_hub_that_is_away_or_silent_is_noticed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        has(services.hub(address, offline=False, seconds=0.2), "warn", "cannot be reached", "HF_ENDPOINT")
    has(services.hub(address, offline=False), "warn", "refused")  # the port is closed now
    has(services.hub(address, offline=True), "ok", "not asked")


def test_logins_are_found_without_being_told(monkeypatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    has(services.hub_token(tmp_path / "token"), "ok", "none", "hf auth login")
    has(services.wandb(), "warn", "not logged in", "wandb login")
    (tmp_path / "token").write_text("hf_sentinel")
    assert services.hub_token(tmp_path / "token").text == f"there is one, in {tmp_path / 'token'}"
    (tmp_path / "netrc").write_text("machine wandb.example login user password sentinel\n")
    assert services.wandb().text == f"logged in to wandb.example, by {tmp_path / 'netrc'}"
    (tmp_path / "netrc").write_text("machine wandb.example login user password sentinel sentinel\n")
    unread = services.wandb()
    has(unread, "warn", "line", "cannot be read")
    assert "sentinel" not in unread.line()
    monkeypatch.setenv("WANDB_API_KEY", "sentinel")
    has(services.wandb(), "ok", "by WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    has(services.wandb(), "ok", "nothing is sent")


def broken() -> Finding:
    raise KeyError(f"{os.environ['SOME_TOKEN']}\nhttps://user:word@hub.example/x")


def sound() -> Finding:
    return Finding("sound", "ok", "fine")


def doubtful() -> Finding:
    return Finding("doubtful", "warn", "slow", "hurry")


def test_a_check_that_breaks_has_failed_and_quotes_no_secret(monkeypatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "sentinel-value")
    first, second = examine([broken, sound])
    assert (first.name, first.status, second.status) == ("broken", "fail", "ok")
    assert "KeyError" in first.text
    assert "[SOME_TOKEN]" in first.text
    assert "https://hub.example/x" in first.text
    assert "\n" not in first.line()


def test_a_missing_package_is_no_broken_check() -> None:
    def wanting() -> Finding:
        import no_such_package  # noqa: F401

        raise AssertionError

    (found,) = examine([wanting])
    has(found, "fail", "a Python package is missing", "no_such_package", "pip install grpo-mlx")


def test_a_version_that_lacks_what_grpo_needs_is_no_broken_check() -> None:
    def wanting() -> Finding:
        raise UserError("mlx-lm 9.0 lacks something that grpo needs")

    (found,) = examine([wanting])
    has(found, "fail", "mlx-lm 9.0 lacks something", "pip install grpo-mlx")
    assert "the check itself broke" not in found.line()


def test_all_that_is_required_is_there(monkeypatch) -> None:
    has(packages.versions(installed(), lambda: ["wandb"]), "fail", "not installed: wandb", "pip install grpo-mlx")
    lines = ["numpy", "no-such-package>=2.1", "neither==1; extra == 'cpu'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)
    assert packages.absent() == ["no-such-package"]


def test_lines_json_and_exit_codes(capsys, monkeypatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "sentinel-value")
    assert report([sound, doubtful], as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["ok", "sound", "fine"], ["warn", "doubtful", "slow", "→", "hurry"]]
    assert report([sound, broken], as_json=True) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False
    assert said["findings"][0] == {"name": "sound", "status": "ok", "text": "fine", "remedy": ""}
    assert report([sound], as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def doctor(tmp_path: Path, before: str = "", *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with nobody to reach and homes in a fresh folder."""
    closed = "http://127.0.0.1:9"
    settings = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": closed, "PYTHONPATH": str(ROOT)}
    code = f"import sys; {before}\nfrom grpo.cli import main; sys.argv = ['grpo', 'doctor', *sys.argv[1:]]; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "0", **settings, **env},
    )


def test_the_command_tells_no_secret(tmp_path: Path) -> None:
    secrets = {"WANDB_API_KEY": "f" * 40, "HF_TOKEN": "hf_sentinelsentinel"}
    away = {"HF_ENDPOINT": "http://user:sentinelword@127.0.0.1:9"}
    ran = doctor(tmp_path, "", "--json", **secrets, **away)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    findings = {finding["name"]: finding for finding in json.loads(ran.stdout)["findings"]}
    assert len(findings) == len(CHECKS)
    assert findings["hub"]["status"] == "warn"
    assert "http://127.0.0.1:9 cannot be reached" in findings["hub"]["text"]
    assert "HF_TOKEN" in findings["hub token"]["text"]
    assert "WANDB_API_KEY" in findings["wandb"]["text"]
    assert not any(secret in ran.stdout + ran.stderr for secret in [*secrets.values(), "sentinelword"])


def test_without_mlx_it_still_answers(tmp_path: Path) -> None:
    ran = doctor(tmp_path, "sys.modules['mlx.core'] = None")
    assert ran.returncode == 1
    assert "Traceback" not in ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == len(CHECKS)
    assert any(line.startswith("fail  device") and "mlx.core" in line for line in lines)
    assert any(line.startswith("ok    recipes") for line in lines)
