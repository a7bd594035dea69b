"""Measures how much faster a setting makes a run learn: steps and rollouts to a held-out accuracy, over seeds.

    python scripts/benchmarks/lessons.py teacher --seeds 0-7 --out lessons.jsonl
    python scripts/benchmarks/lessons.py agents --seeds 0-2 --out lessons.jsonl
    python scripts/benchmarks/lessons.py summary --out lessons.jsonl [--against ARM]

A comparison has several arms: one recipe with different settings, of which the first arm is the baseline. Each arm
trains from each seed until its greedy accuracy on held-out prompts reaches the target, or its steps are used up. FILE
gets a line of JSON per run, and runs that are already in FILE are not repeated. The summary has the ratio of each arm
to the first arm (or to another arm: --against), seed by seed: the median, and its 95 % bootstrap interval.

A process is bound to one core, so processes for other seeds can run at the same time. No network is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from statistics import median

from curves import curves

RESAMPLES = 10_000
COLUMNS = ("arm", "seeds", "steps", "rollouts", "ratio of steps", "ratio of rollouts")


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm: its name, and its settings in addition to the comparison's."""

    name: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Arms to compare on one recipe. `arms` creates the arms for a seed, with a folder for their files.

    Each arm trains at most `steps` steps. It is evaluated before the first step and after every `every` steps, until
    its accuracy reaches `target`, if there is one. `measure` is the evaluation metric of this accuracy.
    """

    recipe: str
    target: float | None
    steps: int
    every: int
    arms: Callable[[Comparison, int, Path], list[Arm]]
    settings: tuple[str, ...] = ()
    measure: str = "greedy"


@dataclass(frozen=True, slots=True)
class Run:
    """The learning curve of one arm and seed: its accuracy after `steps` steps and `rollouts` sampled rollouts.

    If `reached`, the last entry reached `target`.
    """

    comparison: str
    arm: str
    seed: int
    target: float | None
    reached: bool
    steps: list[int]
    rollouts: list[int]
    accuracy: list[float]
    seconds: float


def train(
    comparison: Comparison, arm: Arm, seed: int, until: float = inf, keep: Path | None = None
) -> Iterator[tuple[int, int, float]]:
    """Train one arm. Yields steps, rollouts and accuracy at each evaluation, until the accuracy reaches `until`.

    At the end, the adapter is saved in the folder `keep`, if it is given.
    """
    from grpo.plugins import bundled
    from grpo.recipes import load_recipe
    from grpo.runs.prepare import prepare

    settings = (f"seed={seed}", f"optim.steps={comparison.steps}", "eval.samples=1")
    cfg = load_recipe(
        bundled("recipes") / f"{comparison.recipe}.yaml", [*settings, *comparison.settings, *arm.settings]
    )
    run = prepare(cfg, alone=True)
    assert run.evaluator is not None, "the recipe has an eval section"
    with closing(run.opened):
        rollouts = 0
        for step in range(comparison.steps + 1):
            if step > 0:
                rollouts += sum(len(group.rollouts) for group in run.trainer.step(step).sampled)
            if step % comparison.every == 0:
                accuracy = run.evaluator(step).values[comparison.measure]
                yield step, rollouts, accuracy
                if accuracy >= until:
                    break
        if keep is not None:
            keep.mkdir(parents=True)
            run.trainer.policy.adapters.save(keep)


def measured(name: str, arm: Arm, seed: int) -> Run:
    """Train one arm of the comparison `name` until it reaches the target."""
    comparison, began = COMPARISONS[name], time.perf_counter()
    until = inf if comparison.target is None else comparison.target
    steps, rollouts, accuracy = zip(*train(comparison, arm, seed, until), strict=True)
    seconds = round(time.perf_counter() - began, 1)
    reached = accuracy[-1] >= until
    return Run(name, arm.name, seed, comparison.target, reached, [*steps], [*rollouts], [*accuracy], seconds)


def summary(runs: Sequence[Run], against: str | None = None) -> str:
    """A Markdown table of one comparison: medians over seeds, and ratios to one arm with intervals. For a comparison
    without a target, the learning curves."""
    if runs[0].target is None:
        return f"{runs[0].comparison}: accuracy in percent\n\n{curves(runs)}"
    arms = list(dict.fromkeys(run.arm for run in runs))
    plain = against or arms[0]
    first = {run.seed: run for run in runs if run.arm == plain}
    rows = [_row(arm, [run for run in runs if run.arm == arm and run.seed in first], first) for arm in arms]
    title = f"{runs[0].comparison}: to an accuracy of {runs[0].target:g}; ratios are to {plain}"
    return "\n".join([title, "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *rows]) + "\n"


def _row(arm: str, runs: Sequence[Run], first: dict[int, Run]) -> str:
    cells = [arm, str(len(runs))]
    counts: tuple[Callable[[Run], int], ...] = (lambda run: run.steps[-1], lambda run: run.rollouts[-1])
    cells += [f"{median(needed(run, count) for run in runs):g}" for count in counts]
    for count in counts:
        ratios = [needed(run, count) / count(first[run.seed]) for run in runs]
        low, high = interval(ratios)
        cells.append(f"{median(ratios):.2f} ({low:.2f} to {high:.2f})")
    return f"| {' | '.join(cells)} |"


def needed(run: Run, count: Callable[[Run], int]) -> float:
    """The steps or rollouts to the target; infinity if the run ended before the target.

    (The arm that others are compared with counts with its actual number, even if it ended before the target: the ratio
    is then too high, never too low.)
    """
    return count(run) if run.reached else inf


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return medians[RESAMPLES // 40], medians[-RESAMPLES // 40]


def read(file: Path) -> list[Run]:
    """The runs in a file of JSON lines; empty if there is no file yet."""
    return [Run(**json.loads(line)) for line in file.read_text().splitlines()] if file.is_file() else []


def teacher(comparison: Comparison, seed: int, into: Path) -> list[Arm]:
    """A student with only GRPO, and with a teacher, which is the adapter of a longer GRPO run from another seed.

    Steps are small, 2 prompts × 4 completions: rewards then carry little signal, a teacher as much as always. Only GRPO
    trains at its best learning rate of 5e-4, 1e-3 and 2e-3 (1e-3), and also at the rate of the other arms.
    """
    folder, small = into / f"teacher-{seed}", ("rollout.prompts_per_step=2", "rollout.num_generations=4")
    longer = replace(comparison, steps=60, every=60)
    *_, (_, _, greedy) = train(longer, Arm("teacher"), 1000 + seed, keep=folder)
    print(f"teacher of seed {seed}: greedy {greedy:.1%}", flush=True)
    fast, adapter = "optim.learning_rate=2e-3", f"teacher.adapter={folder}"
    alone = "rewards.0.weight=0"
    return [
        Arm("GRPO", (*small, "optim.learning_rate=1e-3")),
        Arm("GRPO, twice the rate", (*small, fast)),
        Arm("GRPO and exact KL", (*small, fast, adapter, "teacher.kl=exact")),
        Arm("exact KL alone", (*small, fast, adapter, "teacher.kl=exact", alone)),
        Arm("sampled KL alone", (*small, fast, adapter, "teacher.kl=sampled", alone)),
    ]


def pools(_: Comparison, seed: int, into: Path) -> list[Arm]:
    """Sums, 70 % of which have an impossible answer, visited in epochs and drawn by difficulty.

    Each seed has other 30 tasks with right answers and 70 tasks with wrong ones. A step is one prompt × 8 completions,
    so a task without a signal costs a step. Steps are small, so that tasks come up several times before the target:
    a task has no solve rate before its first step.
    """
    from grpo.builtin.tasks import rows

    tasks = random.Random(seed).sample(rows("builtin:arithmetic", "train"), 100)
    hopeless = [{**row, "answer": str(100 + int(row["answer"]))} for row in tasks[30:]]  # sums are below 37
    file = into / f"pools-{seed}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*tasks[:30], *hopeless]))
    held_out = ("eval.source=builtin:arithmetic", "eval.split=test")
    small = ("rollout.prompts_per_step=1", "rollout.num_generations=8", "optim.learning_rate=7e-5")
    settings = (f"data.source={file}", *held_out, *small)
    wider = "data.curriculum={hard: 0.2, hard_threshold: 0.25, easy_threshold: 0.75}"
    return [
        Arm("epochs", settings),
        Arm("pools", (*settings, "data.curriculum={}")),
        Arm("pools, bounds 0.25 and 0.75", (*settings, wider)),
    ]


def replay(comparison: Comparison, seed: int, into: Path) -> list[Arm]:
    """The tasks of `pools`, 70 % of which have no signal, with older groups instead of groups without a signal.

    A step is 4 prompts × 4 completions, so that about one of its groups teaches. Replay helps more at a small learning
    rate, so the arms train at the first arm's best rate of 5e-4, 1e-3 and 2e-3 (2e-3), and two arms also at half of it.
    """
    slow, fast = "optim.learning_rate=1e-3", "optim.learning_rate=2e-3"
    small = ("rollout.prompts_per_step=4", "rollout.num_generations=4")
    settings = (*pools(comparison, seed, into)[0].settings, *small)
    again = "rollout.dynamic_sampling=2"
    return [
        Arm("no replay", (*settings, fast)),
        Arm("reuse 2", (*settings, fast, "rollout.reuse=2")),
        Arm("reuse 4", (*settings, fast, "rollout.reuse=4")),
        Arm("reuse 8", (*settings, fast, "rollout.reuse=8")),
        Arm("dynamic sampling 2", (*settings, fast, again)),
        Arm("dynamic sampling 2, reuse 4", (*settings, fast, again, "rollout.reuse=4")),
        Arm("no replay, half the rate", (*settings, slow)),
        Arm("reuse 4, half the rate", (*settings, slow, "rollout.reuse=4")),
    ]


def agents(_: Comparison, __: int, ___: Path) -> list[Arm]:
    """A guessing game of several turns, with the game as an environment and with the agent that plays it through the
    OpenAI client. Prompts and rewards are the same, so the curves should differ only by random draws."""
    from grpo.plugins import bundled

    agent = bundled("recipes").resolve() / "learning" / "guess_agent.py"
    return [Arm("environment"), Arm("agent", (f"environment={{agent: '{agent}:run', rollout_timeout: 60}}",))]


def lag(_: Comparison, __: int, ___: Path) -> list[Arm]:
    """Sampling and training at the same time: completions come from the policy before the last update, with ratios to
    that policy or with a correction. One process does the work of both here."""
    apart, corrected = "ranks={sample: 1, train: 1}", "loss.importance_sampling_correction=token_truncate"
    return [Arm("no lag"), Arm("lag 1", (apart,)), Arm("lag 1, corrected", (apart, corrected))]


COMPARISONS = {
    "teacher": Comparison("quickstart", 0.9, 80, 1, teacher, ("eval.prompts=128",)),
    "pools": Comparison("quickstart", 0.9, 600, 8, pools, ("eval.prompts=128",)),
    "replay": Comparison("quickstart", 0.9, 120, 2, replay, ("eval.prompts=128",)),
    "lag": Comparison("quickstart", 0.9, 120, 2, lag, ("eval.prompts=128",)),
    "agents": Comparison("learning/guess", None, 30, 5, agents, ("eval.samples=4",), "avg@4"),
}


def _compare(name: str, seeds: Sequence[int], out: Path) -> None:
    """Train the runs of a comparison that are not yet in the file."""
    known = {(run.comparison, run.arm, run.seed) for run in read(out)}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as into:
            for arm in COMPARISONS[name].arms(COMPARISONS[name], seed, Path(into)):
                if (name, arm.name, seed) in known:
                    continue
                run = measured(name, arm, seed)
                with out.open("a") as file:
                    file.write(json.dumps(asdict(run)) + "\n")
                end = f"{run.accuracy[-1]:.1%} after {run.steps[-1]} steps"
                print(f"{arm.name}, seed {seed}: {end}, {run.seconds} s", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("comparison", choices=(*COMPARISONS, "summary"))
    parser.add_argument("--seeds", type=_seeds, default=range(8), metavar="A-B", help="from A to B (default: 0-7)")
    parser.add_argument("--out", type=Path, default=Path("lessons.jsonl"), metavar="FILE", help="lessons.jsonl")
    parser.add_argument("--against", metavar="ARM", help="for a summary: the arm that others are compared with")
    return parser.parse_args()


def _seeds(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _keep_to_one_core(number: int) -> None:
    """Bind this process and its threads to one of the allowed cores. Call it before MLX is imported."""
    if sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def main() -> None:
    args = _arguments()
    if args.comparison == "summary":
        runs = read(args.out)
        for name in dict.fromkeys(run.comparison for run in runs):
            print(summary([run for run in runs if run.comparison == name], args.against))
        return
    _keep_to_one_core(8 * list(COMPARISONS).index(args.comparison) + args.seeds[0])
    _compare(args.comparison, args.seeds, args.out)


if __name__ == "__main__":
    main()
