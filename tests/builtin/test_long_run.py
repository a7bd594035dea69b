"""A run of many steps and many conversations holds no more memory and no more descriptors than at its beginning."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from grpo.plugins import bundled

WATCH = """
import json, os
from pathlib import Path
from grpo.processes.tree import PAGE, descendants

def watch(record):
    pids = [os.getpid(), *descendants(os.getpid())]
    held = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * PAGE
    descriptors = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
    with open(Path(__file__).with_name("watched.jsonl"), "a") as file:
        file.write(json.dumps([len(pids), descriptors, held]) + "\\n")
"""
STEPS = 500
SETTINGS = (f"optim.steps={STEPS}", "optim.learning_rate=1e-6", "rollout.prompts_per_step=2", "eval=null")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_500_steps_are_flat(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "watch.py").write_text(WATCH)
    settings = [*SETTINGS, f"output_dir={tmp_path / 'run'}", f"log.use=[{tmp_path / 'watch.py'}]"]
    ran = subprocess.run(
        [sys.executable, "-c", "from grpo.cli import main; main()", "train",
         bundled("recipes") / "learning" / "guess.yaml", *settings],
        env={**os.environ, "GRPO_CACHE": str(cache)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    watched = [json.loads(line) for line in (tmp_path / "watched.jsonl").read_text().splitlines()]
    assert len(watched) == STEPS
    processes, descriptors, held = zip(*watched[100:], strict=True)
    assert set(processes) == {processes[0]}
    assert max(descriptors) == min(descriptors)
    assert fmean(held[-50:]) - fmean(held[:50]) < 10 << 20
