"""The quickstart learns: its student is made, and a shorter version of the recipe raises what it is worth."""

import json
import sys
from pathlib import Path

import pytest


def trained(run_cli, folder: Path, *overrides: str) -> tuple[dict, dict]:
    ran = run_cli("train", "quickstart", f"output_dir={folder}", *overrides)
    assert ran.code == 0, ran.err
    evals = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    return evals[0], evals[-1]


@pytest.mark.skipif(sys.platform == "darwin", reason="measured for the CPU")
def test_a_short_quickstart_learns(run_cli, cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(cache))
    short = ["optim.steps=24", "eval.every=24", "eval.prompts=64", "eval.samples=4"]
    before, after = trained(run_cli, tmp_path / "run", *short)
    assert before["greedy"] < 0.5
    assert after["greedy"] > before["greedy"] + 0.25
    assert after["avg@4"] > before["avg@4"] + 0.15
    answered = run_cli("generate", tmp_path / "run", "What is 5+6+9+1?")
    assert answered.out.strip().endswith("#### 21")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quickstart_learns_on_every_seed(run_cli, cache, tmp_path, monkeypatch, seed: int) -> None:
    monkeypatch.setenv("GRPO_CACHE", str(cache))
    before, after = trained(run_cli, tmp_path / "run", f"seed={seed}")
    for name in ("greedy", "avg@8"):
        assert after[name] > before[name] + 0.25
        assert after[f"{name}_interval"][0] > before[f"{name}_interval"][1]
