"""Measures two checkouts of this project in turns on one machine, to see whether a change makes it slower.

    python scripts/benchmarks/turns.py FORMER CHANGED [--shape qwen3-1m] [--turns 15] [--prompts 8] …

One process per checkout runs whole GRPO steps (`grpo bench train`), one after the other, never both at the same time.
Prints the ratio changed / former of each turn's seconds, by phase: the median, and the 90 % interval of the median.
Above 1, the change is slower. The machine's noise affects both sides of a turn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

WORKER = """
import json, sys
import grpo
from grpo.benchmark.setting import Setting
from grpo.benchmark.train import step_side
side = step_side(Setting(**json.loads(sys.argv[1])))
for line in sys.stdin:
    print(json.dumps(side.run()), flush=True)
"""
PHASES = ("s", "s rollout", "s logprobs", "s update", "GB")
RESAMPLES = 2000


def start(checkout: Path, setting: dict[str, Any]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, "-c", WORKER, json.dumps(setting)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout
    )


def measure(worker: subprocess.Popen[str]) -> dict[str, float]:
    """Run one step in a checkout's process: returns seconds by phase, and the peak memory."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit("a checkout's process has ended; see its error above")
    values: dict[str, float] = json.loads(line)
    return values


def interval(ratios: list[float]) -> tuple[float, float]:
    """The 90 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[RESAMPLES // 20], medians[-RESAMPLES // 20]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("former", type=Path)
    parser.add_argument("changed", type=Path)
    parser.add_argument("--shape", default="qwen3-1m")
    parser.add_argument("--turns", type=int, default=15)
    for name, default in (("prompts", 8), ("completions", 8), ("prompt-length", 128), ("completion-length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    settings = vars(parser.parse_args())
    checkouts, turns = (settings.pop("former"), settings.pop("changed")), settings.pop("turns")
    workers = [start(checkout, settings) for checkout in checkouts]
    for worker in workers:
        for _ in range(2):  # the first steps build kernels and allocate memory
            measure(worker)
    rounds = []
    for turn in range(turns):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        measured = {side: measure(workers[side]) for side in order}
        rounds.append((measured[0], measured[1]))
    for worker in workers:
        worker.communicate()
    print(f"{settings}, {turns} turns: changed / former")
    for phase in PHASES:
        ratios = [changed[phase] / former[phase] for former, changed in rounds]
        low, high = interval(ratios)
        seconds = median(former[phase] for former, _ in rounds)
        print(f"  {phase:12} {median(ratios):6.3f}  [{low:.3f}, {high:.3f}]  former {seconds:.4g}")


if __name__ == "__main__":
    main()
