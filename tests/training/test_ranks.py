"""Several processes on one machine, by mlx.launch and the ring backend: one run, divided."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from grpo.backend.ranks import Ranks

HERE = Path(__file__).parent
LAUNCH = Path(sys.executable).with_name("mlx.launch")

pytestmark = pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside this Python")


def launch(n: int, *command: object, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    passed = {"PYTHONPATH": paths, "MKL_NUM_THREADS": "1", **environment}
    settings = [argument for name, value in passed.items() for argument in ("--env", f"{name}={value}")]
    return subprocess.run(
        [LAUNCH, "-n", str(n), "--backend", "ring", *settings, "--", sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": paths},
    )


def test_two_processes_give_the_loss_gradient_and_step_of_one(tmp_path) -> None:
    found = []
    for n in (1, 2):
        out = tmp_path / str(n)
        out.mkdir()
        ran = launch(n, HERE / "ranks_worker.py", "gradient", out)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        found.append([json.loads((out / f"facts-{rank}.json").read_text()) for rank in range(n)])
    (alone,), (first, second) = found
    assert first["batches"] + second["batches"] == alone["batches"] > 1
    assert first["size"] == 2
    assert first["told"] == second["told"] == ["a", "b", "c"]
    for name, value in alone.items():
        if name not in ("batches", "size", "told"):
            assert first[name] == second[name] == pytest.approx(value, abs=1e-6), name
    for kind in ("gradient", "policy"):
        expected = mx.load(str(tmp_path / f"1/{kind}-0.safetensors"))
        for rank in range(2):
            got = mx.load(str(tmp_path / f"2/{kind}-{rank}.safetensors"))
            assert max(mx.abs(got[path] - array).max().item() for path, array in expected.items()) < 1e-6


def test_a_run_of_two_processes_is_one_run(recipe) -> None:
    ran = launch(2, "-c", "from grpo.cli import main; main()", "train", recipe, "optim.steps=3")
    said = ran.stdout + ran.stderr
    assert "finished after step 3" in said, said
    assert said.count("2 steps of") + said.count("3 steps of") == 1  # one of them talks
    steps = [json.loads(line) for line in Path("runs/toy/metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert [step["num_prompts"] for step in steps] == [2, 2, 2]
    assert Path("runs/toy/checkpoints/step-000003/adapters.safetensors").exists()


def test_a_process_that_is_killed_ends_the_others_in_bounded_time(tmp_path) -> None:
    started = time.monotonic()
    ran = launch(2, HERE / "ranks_worker.py", "die", tmp_path, GRPO_RANK_TIMEOUT="5")
    assert time.monotonic() - started < 60
    assert "process 0 of 2: another process was lost" in ran.stdout + ran.stderr
    assert float((tmp_path / "waited-0").read_text()) < 10


def test_alone_every_exchange_is_nothing() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.first, ranks.own) == (0, 1, True, ())
    assert ranks.share([1, 2, 3]) == ranks.merge([1, 2, 3]) == [1, 2, 3]
    assert ranks.gather("x") == ["x"]
    assert ranks.any(True) is True
    assert ranks.sum_counts({"a": 2}) == {"a": 2.0}


def test_one_clear_message_when_nothing_is_heard() -> None:
    code = "import time; from grpo.backend.ranks import Ranks; r = Ranks(); r.patience = 0.2"
    code += "\nwith r._watched(): time.sleep(9)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=25)
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "nothing from the others" in ran.stderr
