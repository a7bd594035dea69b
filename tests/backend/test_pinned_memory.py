"""Locked memory of the host, with a driver that only notes what it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from backend.locking import Driver, locking

from grpo.backend import pinned
from grpo.errors import UserError


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return locking(monkeypatch)


def test_memory_is_locked_in_pieces_that_follow_one_another_and_never_move(driver: Driver) -> None:
    arena = pinned.Arena()
    first, second = arena.take(1000), arena.take(pinned.PIECE)
    assert second - first == 1024  # a multiple of 256
    assert driver.locked == [(first, pinned.PIECE), (first + pinned.PIECE, pinned.PIECE)]
    assert arena.bytes == 2 * pinned.PIECE
    arena.begin()
    assert [arena.take(1000), arena.take(1)] == [first, second]
    assert arena.bytes == 2 * pinned.PIECE


def test_what_cannot_be_locked_is_refused_with_what_is_there_and_why(driver: Driver) -> None:
    arena = pinned.Arena()
    with pytest.raises(UserError) as error:
        arena.take(4 * pinned.PIECE)
    assert str(error.value) == (
        "optim.offload_activations: 0.2 GB of the machine's memory hold layers' inputs, and the machine has no more "
        "memory for them (CUDA's driver says CUDA_ERROR_OUT_OF_MEMORY). Remove the setting, or lower "
        "optim.micro_batch_tokens"
    )


def test_some_of_the_machine_s_memory_is_left_to_others(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "available", lambda: pinned.LEAST - 1)
    with pytest.raises(UserError, match=r"no more memory for them \(1\.0 GB are free\)"):
        pinned.Arena().take(1)
    assert driver.locked == []


def test_what_is_available_is_the_container_s_where_that_is_less(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  5000 kB\n")
    assert pinned.available(tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert pinned.available(tmp_path) == 5000 * 1024
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.current").write_text("2500000\n")
    (group / "memory.stat").write_text("anon 2000000\nfile 400000\n")
    assert pinned.available(tmp_path) == 900_000  # files are read again when they are needed
