"""Trains the students of the built-in tasks with several losses and seeds. `scripts/learning` runs this.

Each run is `grpo train recipes/learning/<task>.yaml` with the loss and the seed as overrides. Finished runs are not
repeated. The folder gets the runs, results.json (every evaluation of every run), table.md and curves.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from curves import cell

from grpo.config import ModelConfig
from grpo.model.load import model_folder
from grpo.plugins import bundled
from grpo.telemetry.jsonl import read_evaluations

TASKS = ("arithmetic", "countdown", "sorting", "format")
LOSSES = ("grpo", "dapo", "dr_grpo", "gspo", "cispo")
COLOURS = dict(zip(LOSSES, ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377"), strict=True))
TRAIN = [sys.executable, "-c", "from grpo.cli import main; main()", "train"]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: its held-out accuracies at each evaluated step, and its seconds, start-up included."""

    task: str
    loss: str
    seed: int
    steps: list[int]
    greedy: list[float]
    sampled: list[float]
    seconds: float


Key = tuple[str, str, int]


def main() -> None:
    args = _arguments()
    args.into.mkdir(parents=True, exist_ok=True)
    keys = [(task, loss, seed) for seed in args.seeds for task in args.tasks for loss in args.losses]
    for task in args.tasks:
        model_folder(ModelConfig(name=f"builtin:{task}-student"))  # made before the runs are timed
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda key: _result(key, args.steps, args.into), keys))
    (args.into / "results.json").write_text(_lines(results))
    (args.into / "table.md").write_text(table(results))
    plot(results, args.into / "curves.svg")
    print(table(results), end="")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/learning", description=(__doc__ or "").partition(" `scripts")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES, metavar="LOSS", help=", ".join(LOSSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), metavar="SEED", help="at most 10; 0 1 2")
    parser.add_argument("--steps", type=int, default=40, help="steps per run (default: 40)")
    parser.add_argument("--jobs", type=int, default=1, help="simultaneous runs, each on one core (default: 1)")
    parser.add_argument("--into", type=Path, default=Path("runs/learning"), help="folder for the runs and results")
    return parser.parse_args()


def _result(key: Key, steps: int, into: Path) -> Result:
    """The recorded result of a run; trains the run if there is no result."""
    task, loss, seed = key
    folder = into / f"{task}-{loss}-{seed}-{steps}"
    record = folder / "result.json"
    if not record.is_file():
        seconds = _train(key, steps, folder)
        record.write_text(json.dumps(asdict(_read(key, folder, seconds))))
    result = Result(**json.loads(record.read_text()))
    print(f"{folder.name}: {result.sampled[0]:.1%} to {result.sampled[-1]:.1%} in {result.seconds:.0f} s", flush=True)
    return result


def _train(key: Key, steps: int, folder: Path) -> float:
    """Train one run, on one core so that sums have a fixed order. Returns its seconds."""
    task, loss, seed = key
    recipe = bundled("recipes") / "learning" / f"{task}.yaml"
    settings = [f"seed={seed}", f"loss.type={loss}", f"optim.steps={steps}", f"output_dir={folder}"]
    one_core = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    began = time.perf_counter()
    ran = subprocess.run(
        [*TRAIN, str(recipe), *settings, "--overwrite"],
        env=os.environ | one_core,
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        sys.exit(f"{folder.name} failed:\n{ran.stdout}{ran.stderr}")
    return time.perf_counter() - began


def _read(key: Key, folder: Path, seconds: float) -> Result:
    evaluations = read_evaluations(folder)
    (sampled,) = [name for name in evaluations[0].values if name.startswith("avg@")]
    return Result(
        *key,
        steps=[one.step for one in evaluations],
        greedy=[round(one.values["greedy"], 4) for one in evaluations],
        sampled=[round(one.values[sampled], 4) for one in evaluations],
        seconds=round(seconds, 1),
    )


def _lines(results: Sequence[Result]) -> str:
    return "[\n" + ",\n".join(json.dumps(asdict(result)) for result in results) + "\n]\n"


def table(results: Sequence[Result]) -> str:
    """A Markdown table: one row per task and loss, with accuracies before and after in percent, means over seeds."""
    heads = "| task | loss | sampled before | sampled after | gained | greedy before | greedy after |"
    rows = [_row(*both, results) for both in dict.fromkeys((result.task, result.loss) for result in results)]
    return "\n".join([heads, "|" + "---|" * 7, *rows]) + "\n"


def _row(task: str, loss: str, results: Sequence[Result]) -> str:
    mine = [result for result in results if (result.task, result.loss) == (task, loss)]
    columns = [
        [result.sampled[0] for result in mine],
        [result.sampled[-1] for result in mine],
        [result.sampled[-1] - result.sampled[0] for result in mine],
        [result.greedy[0] for result in mine],
        [result.greedy[-1] for result in mine],
    ]
    return f"| {task} | {loss} | {' | '.join(map(cell, columns))} |"


def plot(results: Sequence[Result], path: Path) -> None:
    """Plot sampled accuracy over steps: a panel per task, with the mean and the range over seeds of each loss."""
    import matplotlib
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(result.task for result in results))
    figure = Figure(figsize=(2.6 * len(tasks), 2.8), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for loss in dict.fromkeys(result.loss for result in results):
            mine = [result for result in results if (result.task, result.loss) == (task, loss)]
            by_step = list(zip(*(result.sampled for result in mine), strict=True))
            axes.plot(mine[0].steps, [fmean(one) for one in by_step], color=COLOURS[loss], label=loss)
            axes.fill_between(
                mine[0].steps,
                [min(one) for one in by_step],
                [max(one) for one in by_step],
                color=COLOURS[loss],
                alpha=0.1,
            )
        axes.set(title=task, xlabel="step", ylim=(0, 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out accuracy, sampled")
    panels[-1].legend(fontsize="small", frameon=False, loc="lower right")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "grpo"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
