"""Trackio is told every number and alarm; by a stand-in, and by the package itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from telemetry.trackios import trackio_stand_in

CONSTANT = "def reward(completions, **_):\n    return [0.0 for _ in completions]\n"
TWO_STEPS = ("optim.steps=2", "log.trackio={project: mine, group: g}")


def test_every_number_and_alarm_is_sent_and_a_resumed_run_goes_on(recipe, run_cli, monkeypatch) -> None:
    sent: list = []
    monkeypatch.setitem(sys.modules, "trackio", trackio_stand_in(sent))
    Path("digits.py").write_text(CONSTANT)
    recipe.write_text(recipe.read_text() + "eval: {split: train, prompts: 2, samples: 2}\n")
    ran = run_cli("train", recipe, *TWO_STEPS)
    assert "noise" not in ran.out + ran.err
    assert "Trackio  trackio show --project mine\n" in ran.out
    assert sent[0] == ("init", "mine", "toy", "g", None, "never", False)
    assert sent[-1] == ("finish",)
    logged = {step: values for kind, step, values, *_ in sent[1:-1] if kind == "log" and "train/loss" in values}
    for line in map(json.loads, Path("runs/toy/metrics.jsonl").read_text().splitlines()):
        numbers = {f"train/{name}": value for name, value in line.items() if name not in ("step", "alarms")}
        assert logged[line["step"]] == numbers
    assert [step for kind, step, *rest in sent[1:-1] if kind == "log" and "eval/greedy" in rest[0]] == [0, 2]
    (alert,) = [one for one in sent if one[0] == "alert" and one[2].startswith("equal_rewards")]
    assert alert[1:3] == (1, "equal_rewards at step 1")
    assert alert[3].startswith("step 1: no group has different rewards")
    sent.clear()
    run_cli("train", recipe, *TWO_STEPS, "optim.steps=3", "--resume-changed", "log.trackio.name=other")
    assert sent[0] == ("init", "mine", "other", "g", None, "allow", False)


def test_a_missing_package_says_how_to_install_it(recipe, run_cli, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    ran = run_cli("train", recipe, "log.trackio={}")
    assert ran.code != 0
    assert "log.trackio needs trackio, which is not installed: pip install 'grpo-mlx[trackio]'" in ran.err
    assert not Path("runs/toy").exists()


def test_nobody_imports_it_who_did_not_ask() -> None:
    code = "import sys, grpo.telemetry.loggers; sys.exit('trackio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_the_package_itself_keeps_them(recipe, run_cli, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    Path("digits.py").write_text(CONSTANT)
    ran = run_cli("train", recipe, *TWO_STEPS)
    assert "is disabled" not in ran.err
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("mine", "toy")
    lines = [json.loads(line) for line in Path("runs/toy/metrics.jsonl").read_text().splitlines()]
    assert [log["train/loss"] for log in logs if "train/loss" in log] == [line["loss"] for line in lines]
    assert any(alert["title"].startswith("equal_rewards") for alert in SQLiteStorage.get_alerts("mine"))
