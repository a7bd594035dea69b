"""Compares two processes that sample and train at the same time (`ranks`) with two that each do both: step times.

    python scripts/benchmarks/apart.py sums --turns 3 --out apart.jsonl
    python scripts/benchmarks/apart.py waiting --turns 3 --out apart.jsonl

Both kinds of runs take turns. Each process is bound to its own core. FILE gets a line of JSON per run: the median step,
without the first two steps, and the share of it in which each side worked. Prints the ratio of each turn, apart / both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median

SKIPPED = 2
"""Number of first steps that are not counted, because functions are compiled in them."""
SLOW = """
import random, time
from grpo.builtin.guess import Guess

class Waiting(Guess):
    def step(self, text):
        time.sleep({seconds} * random.random() ** 3)
        return super().step(text)
"""
"""A game with slow turns: most are short and some are long, like a sandbox or a search."""
RUN = """
import os, sys
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["MLX_RANK"])]})
from grpo.cli import main
main()
"""
WORK = {
    "sums": ("quickstart", ()),
    "guess": ("learning/guess", ()),
    "waiting": ("learning/guess", ("environment.use={slow}:Waiting",)),
}
KINDS = {"both": (), "apart": ("ranks={sample: 1, train: 1}",)}


def step_of(work: str, kind: str, steps: int, seconds: float) -> dict[str, float | str]:
    """Train, and return the median step in seconds, with the shares of it in which each side worked."""
    name, settings = WORK[work]
    recipe = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        slow = Path(folder) / "slow.py"
        slow.write_text(SLOW.format(seconds=seconds))
        out = Path(folder) / "run"
        plain = (f"optim.steps={steps}", "eval=null", "checkpoint.metric_for_best_model=null", f"output_dir={out}")
        given = [one.replace("{slow}", str(slow)) for one in (*settings, *plain, *KINDS[kind])]
        one_thread = ("--env", "MKL_NUM_THREADS=1", "--env", "OMP_NUM_THREADS=1")
        port = str(random.SystemRandom().randrange(20_000, 32_000))
        launch = (Path(sys.executable).with_name("mlx.launch"), "-n", "2", "--backend", "ring", "--starting-port", port)
        command = [*launch, *one_thread, "--", sys.executable, "-c", RUN, "train", str(recipe), *given]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
        lines = (out / "metrics.jsonl").read_text().splitlines() if out.exists() else []
        if len(lines) < steps:
            raise SystemExit(ran.stdout + ran.stderr)
    made = [json.loads(line) for line in lines][SKIPPED:]
    told = {name: fmean(one[name] for one in made) for name in ("ranks/sampling", "ranks/training") if name in made[0]}
    phases = {f"time/{name}": median(one[f"time/{name}"] for one in made) for name in ("rollout", "logprobs", "update")}
    return {"work": work, "kind": kind, "step": median(one["step_time"] for one in made), **phases, **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", choices=WORK)
    parser.add_argument("--turns", type=int, default=3, help="number of pairs of runs (default: 3)")
    parser.add_argument("--steps", type=int, default=12, help="steps per run (default: 12)")
    parser.add_argument("--seconds", type=float, default=2.0, help="maximum seconds of a `waiting` turn (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("apart.jsonl"), metavar="FILE", help="default: apart.jsonl")
    args = parser.parse_args()
    for turn in range(args.turns):
        found = {kind: step_of(args.work, kind, args.steps, args.seconds) for kind in KINDS}
        with args.out.open("a") as file:
            file.writelines(json.dumps(one) + "\n" for one in found.values())
        both, apart = (float(found[kind]["step"]) for kind in KINDS)
        use = ", ".join(f"{name} {float(found['apart'][f'ranks/{name}']):.0%}" for name in ("sampling", "training"))
        print(f"turn {turn}: both {both:.2f} s, apart {apart:.2f} s, ratio {apart / both:.2f} ({use})", flush=True)


if __name__ == "__main__":
    main()
