"""Folders that makers of built-in models left when they were killed."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.builtin import models


def test_they_are_removed_at_the_next_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    node = platform.node()
    kept = [f".making-{node}+{os.getpid()}+a", f".making-{node}x+{gone.pid}+a", ".making-abc", "made", f"+{gone.pid}+"]
    left = [f".making-{node}+{gone.pid}+a", ".making-old", f".making-{node}+{os.getpid()}+old"]
    for name in (*kept, *left):
        (tmp_path / name / "model").mkdir(parents=True)
    for name in left[1:]:
        os.utime(tmp_path / name, (0, 0))
    seen = []

    def make(settings, folder: Path, new_model) -> None:
        seen.append(folder.parent.name)
        assert {path.name for path in tmp_path.iterdir()} == {*kept, folder.parent.name}

    monkeypatch.setenv("GRPO_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "make", make)
    made = models.folder("builtin:shop-student", lambda config: None)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, made.name}
    assert seen[0].startswith(f".making-{node}+{os.getpid()}+")
