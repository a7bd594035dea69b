"""A toy run in this process, and what of its records does not depend on the clock."""

import json
from pathlib import Path

from grpo.recipes import load_recipe
from grpo.runs.completions import read_completions, stored_steps
from grpo.runs.loop import Loop, Outcome
from grpo.runs.prepare import prepare
from grpo.runs.resume import context, find_start, plan_of
from grpo.runs.revisions import revisions_of
from grpo.runs.signals import StopRequest
from grpo.telemetry.jsonl import JsonlLogger
from grpo.training.trainer import Trainer


def run(recipe: Path, *overrides: str, change=None, evaluate=None, **how) -> Outcome:
    """Train as `grpo train` does, without its terminal. `change(trainer, stop)` may put something in its way.

    `evaluate(evaluator, stop)` may stand another evaluation in for the run's own.
    """
    cfg = load_recipe(recipe, overrides)
    start = find_start(cfg, **how)
    cfg, prepared = start.cfg, prepare(start.planned)
    trainer: Trainer = prepared.trainer
    state, stop = start.load(trainer), StopRequest()
    measure = evaluate(prepared.evaluator, stop) if evaluate else prepared.evaluator
    if change:
        change(trainer, stop)
    written = context(cfg, trainer.policy.adapters.config, plan_of(trainer), revisions_of(trainer.cfg), prepared.rows)
    begun, checkpoint = start.folder(), start.checkpoint
    with prepared.opened, begun as folder:
        loop = Loop(trainer, folder, written, JsonlLogger(folder).log, stop, state, checkpoint, measure)
        del start, state  # as the command does
        return loop.run()


def timeless(path: Path) -> list[dict]:
    """A log's records without what the clock says, and what the process does."""
    clocked = ("time/", "ranks/", "step_time", "rollout_tokens_per_second", "peak_memory_gb", "speculation/gain")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if not name.startswith(clocked)} for line in lines]
    return [{name: "by time" if "speculation/" in name else value for name, value in line.items()} for line in lines]


def same_end(one: Path, other: Path, completions: bool = True) -> None:
    """Assert that two runs' folders hold the same records, and the same last state to the bit."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        if (one / name).exists() or (other / name).exists():
            assert timeless(one / name) == timeless(other / name)
    stored, also = (stored_steps(folder / "completions") for folder in (one, other))
    if completions:
        assert [path.name for path in stored] == [path.name for path in also]
        assert all(read_completions(a) == read_completions(b) for a, b in zip(stored, also, strict=True))
    last, same = (sorted((folder / "checkpoints").iterdir())[-1] for folder in (one, other))
    assert last.name == same.name
    arrays = [path.name for path in last.glob("*.safetensors")]
    assert {"adapters.safetensors", "optimizer.safetensors"} <= set(arrays)
    for name in arrays:
        assert (last / name).read_bytes() == (same / name).read_bytes()
    mine, theirs = ({**json.loads((f / "state.json").read_text()), "run_id": None} for f in (last, same))
    assert mine == theirs, {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs.get(name)}
