"""Where the kernels that MLX builds for an NVIDIA GPU are kept."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo.backend import kernels


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A machine with two GPUs and MLX for CUDA, whose user has a cache folder."""
    for number in range(2):
        (tmp_path / f"gpus/{number}").mkdir(parents=True)
        (tmp_path / f"gpus/{number}/information").write_text("Model: \t\t NVIDIA H200\nIRQ: 7\n")
    monkeypatch.setattr(kernels, "GPUS", tmp_path / "gpus")
    monkeypatch.setattr(kernels, "_version", lambda wheel: f"{wheel}-1.2" if wheel == "mlx-cuda-12" else None)
    monkeypatch.setattr(kernels, "_locks", [])
    for name in (kernels.VARIABLE, "GRPO_CACHE", *kernels.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    for lock in kernels._locks:
        lock.close()


def test_each_version_kind_of_gpu_and_process_has_a_folder_of_its_own(home: Path, monkeypatch) -> None:
    kernels.keep()
    folder = Path(os.environ[kernels.VARIABLE])
    assert folder == home / "grpo/kernels/mlx-cuda-12-1.2/NVIDIA-H200/0"
    assert folder.is_dir()
    monkeypatch.delenv(kernels.VARIABLE)
    monkeypatch.setenv("MLX_RANK", "3")
    kernels.keep()
    assert os.environ[kernels.VARIABLE] == str(folder.with_name("3"))


def test_a_folder_that_the_user_has_set_stays(home: Path, monkeypatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "/elsewhere")
    kernels.keep()
    assert os.environ[kernels.VARIABLE] == "/elsewhere"
    assert not home.exists()


@pytest.mark.parametrize("lacking", ["gpu", "wheel", "room"])
def test_elsewhere_mlx_decides(home: Path, monkeypatch, lacking: str) -> None:
    if lacking == "gpu":
        monkeypatch.setattr(kernels, "GPUS", home / "nowhere")
    elif lacking == "wheel":
        monkeypatch.setattr(kernels, "_version", lambda wheel: None)
    else:
        home.write_text("a file, where the folder would be")
    kernels.keep()
    assert kernels.VARIABLE not in os.environ


def test_kernels_that_were_not_written_to_the_end_are_removed(home: Path) -> None:
    folder = home / "grpo/kernels/mlx-cuda-12-1.2/NVIDIA-H200/0"
    (folder / "long").mkdir(parents=True)
    for name in ("whole", "cut", "full", "long/name"):
        (folder / f"{name}.ptx").write_text("code")
    (folder / "whole.cu").write_text("source")
    (folder / "full.cu").touch()
    (folder / "long/name.cu").write_text("source")
    kernels.keep()
    assert sorted(path.stem for path in folder.rglob("*.ptx")) == ["name", "whole"]


def test_processes_at_the_same_time_have_folders_of_their_own(home: Path, monkeypatch) -> None:
    """A lock that is open stands for a process; when that has ended, its folder is the next one's."""
    names = []
    for ended in (False, False, False, True):
        if ended:
            kernels._locks.pop(0).close()
        monkeypatch.delenv(kernels.VARIABLE, raising=False)
        kernels.keep()
        names.append(Path(os.environ[kernels.VARIABLE]).name)
    assert names == ["0", "0-1", "0-2", "0"]


def test_a_file_system_without_locks_keeps_kernels_all_the_same(home: Path, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    kernels.keep()
    assert Path(os.environ[kernels.VARIABLE]).name == "0"


def test_the_folder_moves_with_the_cache(home: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path / "moved"))
    kernels.keep()
    assert Path(os.environ[kernels.VARIABLE]).is_relative_to(tmp_path / "moved" / "kernels")
    assert not home.exists()
