"""Repeats a step from the nearest checkpoint before it, to show what happened in the step. Writes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx

from grpo.errors import UserError
from grpo.model.policy import Policy
from grpo.recipes import load_recipe
from grpo.runs.checkpoint import RECIPE, checkpoints, damage, load_checkpoint, newest_whole, read_state, step_of
from grpo.runs.completions import UNNAMED, read_completions
from grpo.runs.drawing import gone_rates
from grpo.runs.folder import CHECKPOINTS, COMPLETIONS, METRICS, check_is_run
from grpo.runs.prepare import prepare
from grpo.runs.resume import as_planned, changes, context_now
from grpo.runs.revisions import pinned
from grpo.runs.sections import with_rates
from grpo.training.batches import by_row, forced, of_completions, rows_of
from grpo.training.packing import Packing
from grpo.training.trainer import Trainer
from grpo.types import Group, StepMetrics


@dataclass(frozen=True, slots=True)
class Replay:
    """A repeated step.

    metrics  the metrics of the step
    ratios   a list per completion of `metrics.groups`, in their order, with a value per trained token: its probability
             under the policy after the update, divided by its probability before
    tokens   the texts of these tokens
    notes    from which checkpoint the step was repeated, and whether it equals the recorded step
    """

    metrics: StepMetrics
    ratios: list[list[float]]
    tokens: list[list[str]]
    notes: list[str]


def replay(run: Path, step: int) -> Replay:
    """Repeat step `step` of a run. Raises UserError if `run` is not a run, or never reached the step."""
    check_is_run(run)
    cfg = load_recipe(run / RECIPE)
    if step > cfg.optim.steps:
        raise UserError(f"--step {step}: this run has {cfg.optim.steps} steps")
    if step > (made := _steps_made(run)) + 1:  # the step after the last one may have stopped the run
        raise UserError(f"--step {step}: this run has done {made} of its {cfg.optim.steps} steps")
    whole, _ = newest_whole(run / CHECKPOINTS)
    cfg = as_planned(pinned(cfg, whole), read_state(whole)["plan"]) if whole else cfg
    nearest = _nearest(run, step)
    if nearest is not None:
        cfg = with_rates(cfg, dict.fromkeys(gone_rates(cfg.data, load_checkpoint(nearest)[0])))
    prepared = prepare(cfg, alone=True)
    with closing(prepared.opened):
        return _made(prepared.trainer, run, step, nearest)


def _nearest(run: Path, step: int) -> Path | None:
    """Return the nearest checkpoint before a step; None if the run must be repeated from the start."""
    earlier = (path for path in reversed(checkpoints(run / CHECKPOINTS)) if step_of(path) < step)
    return next((path for path in earlier if damage(path) is None), None)


def _steps_made(run: Path) -> int:
    """Return the last step in the run's metrics; 0 if there is none."""
    lines = (run / METRICS).read_bytes().splitlines(keepends=True) if (run / METRICS).exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)


def _made(trainer: Trainer, run: Path, step: int, nearest: Path | None) -> Replay:
    begun, notes = _begin(trainer, run, step, nearest)
    for n in range(begun + 1, step):
        trainer.step(n)
    before = trainer.policy.adapters.state()
    metrics = trainer.step(step)
    after = trainer.policy.adapters.state()
    packing = Packing.of(trainer.cfg.optim, trainer.cfg.rollout)
    new = _logprobs(trainer.policy, metrics.groups, packing)
    trainer.policy.adapters.load_state(before)
    old = _logprobs(trainer.policy, metrics.groups, packing)
    trainer.policy.adapters.load_state(after)
    ratios = [mx.exp(mx.array(a) - mx.array(b)).tolist() for a, b in zip(new, old, strict=True)]
    rollouts = [rollout for group in metrics.groups for rollout in group.rollouts]
    decode = trainer.engine.generator.tokenizer.decode
    trained = [rollout.trajectory.of_trained(rollout.trajectory.token_ids) for rollout in rollouts]
    tokens = [[decode([token]) for token in ids] for ids in trained]
    return Replay(metrics, ratios, tokens, [*notes, *_compared(run, metrics)])  # type: ignore[arg-type]


def _begin(trainer: Trainer, run: Path, step: int, nearest: Path | None) -> tuple[int, list[str]]:
    """Load the checkpoint `nearest` into the trainer. Returns the checkpoint's step, and notes."""
    if nearest is None:
        return 0, [f"repeated from the start: {step} steps"]
    state, written = load_checkpoint(nearest)
    trainer.load_state(state.trainer)
    now = context_now(load_recipe(run / RECIPE), written)
    changed = [f"changed since then: {line}" for line in changes(written, now)]
    return state.step, [f"repeated from {nearest}", *changed]


def _logprobs(policy: Policy, groups: Sequence[Group], packing: Packing) -> list[list[float]]:
    """Return the logprobs of every completion's trained tokens under the current policy."""
    rows = rows_of(groups)
    logprobs = by_row(rows, packing, partial(forced, policy))
    found = [rollout.trajectory.of_trained(values) for (_, rollout), values in zip(rows, logprobs, strict=True)]
    return [list(chain.from_iterable(parts)) for parts in of_completions(groups, found)]


def _compared(run: Path, metrics: StepMetrics) -> list[str]:
    """Return a note on whether the completions equal those that the run stored."""
    path = run / COMPLETIONS / f"step-{metrics.step:06d}.parquet"
    if not path.exists():
        return ["the run stored no completions of this step to compare with"]
    stored = read_completions(path)[1]
    named = all(group.task.source != UNNAMED for group in stored)
    same = {_key(group, named) for group in stored} <= {_key(group, named) for group in metrics.groups}
    return ["its completions are those that the run stored" if same else "its completions are NOT those of the run"]


def _key(group: Group, named: bool) -> tuple[Any, ...]:
    """Return a group's task (if tasks are `named`), and its sampled tokens and rewards, for comparison."""
    sampled = tuple((rollout.trajectory.token_ids, rollout.reward) for rollout in group.rollouts)
    return (group.task.identity if named else None, sampled)
