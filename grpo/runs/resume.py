"""Where a run goes on: which checkpoint, whether the recipe is still the one that wrote it, and what is new."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grpo.alarms.past import PastSteps
from grpo.config import Recipe
from grpo.data.fingerprint import fingerprint
from grpo.data.rows import Rows
from grpo.data.streaming import Streamed
from grpo.document import read_written
from grpo.errors import UserError
from grpo.recipes import with_settings, without_single_turn
from grpo.runs.checkpoint import (
    Context,
    load_checkpoint,
    newest_whole,
    read_state,
    restore_replaced,
    versions,
)
from grpo.runs.drawing import check_begins, gone_rates, rates_hash
from grpo.runs.folder import (
    CHECKPOINTS,
    check_run_folder,
    failed_at_once,
    is_run,
    newest_checkpoint,
    recipe_text,
    resumed_folder,
    run_folder,
)
from grpo.runs.given import NOTHING, Given
from grpo.runs.publishing import check_no_secrets
from grpo.runs.revisions import with_revisions
from grpo.runs.sections import data_of, with_rates
from grpo.runs.sources import source_hashes
from grpo.runs.starting import adapter_hashes, with_kept
from grpo.runs.state import RunState
from grpo.training.state import TrainerState
from grpo.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: at step 0, or at the state of a checkpoint; in a new folder, or in that of the run it goes on
    with."""

    cfg: Recipe
    state: RunState | None = None
    checkpoint: Path | None = None
    goes_on: bool = False
    overwrite: bool = False
    notes: tuple[str, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    revisions: Mapping[str, str] = field(default_factory=dict)

    @property
    def planned(self) -> Recipe:
        """The recipe, with what was decided of it when the run that goes on began, and without files of solve rates
        that have gone and are not needed."""
        gone = [] if self.state is None else gone_rates(self.cfg.data, self.state)
        cfg = with_rates(self.cfg, dict.fromkeys(gone))
        return as_planned(with_revisions(cfg, self.revisions), self.plan)

    def load(self, trainer: Trainer) -> RunState:
        """The state to start from, which is the trainer's from now on.

        Raises UserError where it does not fit, where there is no task to begin with, or where one of several processes
        would start from another.
        """
        trainer.ranks.check_same("the recipe", trainer.cfg.model_dump(exclude={"output_dir"}))
        trainer.ranks.check_same("the step to go on after", self.state.step if self.state else 0)
        if self.state is None:
            check_begins(trainer.tasks)
            return RunState(run_id=_new_id(), trainer=TrainerState({}, trainer.counts()))  # a trainer has the arrays
        trainer.load_state(self.state.trainer)
        return self.state

    def folder(self) -> AbstractContextManager[Path]:
        """The run's folder, for a `with` block."""
        if not self.goes_on:
            return run_folder(self.cfg, self.overwrite)
        if self.state is None:
            return resumed_folder(self.cfg, 0, -1)
        after = self.state.after
        return resumed_folder(self.cfg, self.state.step, after.step if after else -1, self.state.first)


def find_start(
    cfg: Recipe,
    resume: bool = False,
    checkpoint: Path | None = None,
    changed: bool = False,
    overwrite: bool = False,
    dry: bool = False,
    given: Given = NOTHING,
) -> Start:
    """Where a run with this recipe begins.

    To `resume` is to go on after the newest whole checkpoint in its folder, from the beginning where there is none yet.
    A `checkpoint` is gone on from in any case: in its own run's folder, which forgets what came after it, or in a new
    one. A `dry` run touches nothing, and says of a run in its folder what to do about it.

    Raises UserError for a recipe that holds a secret, for a folder that holds another run, where every checkpoint is
    damaged, and for a recipe, code or data that did not write the checkpoint, unless it may have `changed`.
    """
    assert cfg.output_dir is not None
    check_no_secrets(cfg)
    folder = Path(cfg.output_dir)
    if checkpoint is not None:
        _check_named(checkpoint)
    own = checkpoint is None or checkpoint.resolve().parent == (folder / CHECKPOINTS).resolve()
    goes_on = (resume or changed or checkpoint is not None) and own
    if goes_on and overwrite:
        raise UserError("--overwrite replaces the run and --resume goes on with it: choose one")
    check_run_folder(cfg, overwrite or goes_on, dry)
    in_the_way = dry and is_run(folder) and not (overwrite or goes_on or failed_at_once(folder))
    goes_on = goes_on and is_run(folder)
    notes: list[str] = []
    if checkpoint is None and goes_on:
        if not dry:
            restore_replaced(folder / CHECKPOINTS)
        checkpoint, notes = newest_whole(folder / CHECKPOINTS)
        if notes and checkpoint is None:
            raise UserError(f"{folder}: no checkpoint is whole, so there is nothing to go on from: " + "; ".join(notes))
    cfg = with_kept(cfg, checkpoint.resolve().parents[1] if checkpoint is not None else folder)
    if checkpoint is None:
        notes = ["no checkpoint to go on from: begins at step 0"] if resume or changed else []
        if in_the_way:
            notes = [f"{folder} holds a run: training takes --resume, --overwrite or another output_dir"]
        return Start(cfg, goes_on=goes_on, overwrite=overwrite, notes=tuple(notes))
    state, written = load_checkpoint(checkpoint)
    cfg = _with_former_rates(cfg, state, written)
    differences = changes(written, context_now(cfg, written, given))
    if differences and not changed:
        listed = "\n".join(f"  {line}" for line in differences)
        what = "was written with another recipe, other code or other data"
        raise UserError(f"{checkpoint} {what}; --resume-changed goes on all the same:\n{listed}")
    if any(line.startswith(COMPARED) for line in differences):
        trainer = state.trainer.without_groups()
        state = replace(state, rewards=(), start=None, past=PastSteps(), trainer=trainer)
    if not goes_on:  # a branch off another run
        state = replace(state, run_id=_new_id(), first=state.step + 1)
    notes += [_goes_on(cfg.optim.steps, state.step, checkpoint), *(f"changed: {line}" for line in differences)]
    plan = {} if differences else written.plan
    notes += _newer(checkpoint)
    return Start(cfg, state, checkpoint, goes_on, overwrite, tuple(notes), plan, written.revisions)


WITHOUT_INFLUENCE = (
    "output_dir",
    "model.shard",
    "model.shard_size",
    "rollout.speculate",
    "ranks.sample",
    "ranks.train",
    "checkpoint.every",
    "checkpoint.keep",
    "log.wandb",
    "log.tensorboard",
    "log.trackio",
    "log.completions",
    "alarms",
)
"""Settings that change neither what is sampled nor what is learned. A resumed run may have others without leave."""

COMPARED = ("model.", "data.", "rewards.", "rollout.", "environment", "tools", "code of ", "contents of ")
"""How the differences begin after which the rewards of earlier and later steps cannot be compared, and after which
groups that are kept are not what this run would have sampled."""


def _with_former_rates(cfg: Recipe, state: RunState, written: Context) -> Recipe:
    """The recipe with the whole names that files of solve rates had when they were there, if they have gone and are
    not needed: only files that are there are found beside a recipe."""
    data = read_written(written.recipe)["data"]
    before = dict(zip(cfg.data.parts, data.get("sources") or [data], strict=False))
    former = {name: before.get(name, {}).get("solve_rates") for name in gone_rates(cfg.data, state)}
    named = {name: str(part.solve_rates) for name, part in cfg.data.parts.items()}
    return with_rates(cfg, {name: file for name, file in former.items() if file and Path(file).match(named[name])})


def _goes_on(steps: int, made: int, checkpoint: Path) -> str:
    """What is said of a run of so many steps that goes on from a checkpoint with so many made."""
    if made < steps:
        return f"goes on after step {made} from {checkpoint}"
    return (
        f"no step is left to train: optim.steps is {steps}, and {checkpoint} is after step {made}. To train further, "
        "set optim.steps to more (it counts from the run's first step) and take --resume-changed, or changed=True in "
        "Python"
    )


def _check_named(checkpoint: Path) -> None:
    """Raise UserError for what cannot be gone on from, because it is not there or is a whole run."""
    if not checkpoint.is_dir():
        raise UserError(f"--resume-from {checkpoint}: there is no such folder")
    if is_run(checkpoint):
        raise UserError(
            f"--resume-from {checkpoint}: is a run; name its checkpoint, such as {newest_checkpoint(checkpoint)}"
        )


def as_planned(cfg: Recipe, plan: Mapping[str, Any]) -> Recipe:
    """The recipe with a former plan in the place of `auto`.

    A plan is a measurement: made anew it may cut micro-batches otherwise, and sums would differ in their last bits.
    """
    optim = "micro_batch_tokens", *(() if cfg.model.shard == "fsdp" else ("gradient_checkpointing",))
    decided = {f"optim.{name}": plan[name] for name in optim if name in plan and getattr(cfg.optim, name) == "auto"}
    return with_settings(cfg, decided)


def _new_id() -> str:
    """An id for a run, also W&B's: the one that its environment names (as an agent of a sweep does), or a drawn one."""
    return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)


def plan_of(trainer: Trainer) -> dict[str, Any]:
    """What was decided of the settings that may be `auto`."""
    optim = trainer.cfg.optim
    return {name: getattr(optim, name) for name in ("micro_batch_tokens", "gradient_checkpointing")}


def context(
    cfg: Recipe,
    adapter: Mapping[str, Any],
    plan: Mapping[str, Any],
    revisions: Mapping[str, str],
    rows: Mapping[str, Rows | Streamed],
    given: Given = NOTHING,
) -> Context:
    """What this recipe's checkpoints say about their run. `rows` of the Hub are known by their revision."""
    named = data_of(cfg)
    inputs = {name: fingerprint(table) for name, table in rows.items() if given.is_local(name, named[name])}
    sources = source_hashes(cfg.uses) | given.sources()
    inputs |= adapter_hashes(cfg) | rates_hash(cfg.data)
    return Context(recipe_text(cfg), sources, adapter, plan, revisions, inputs)


def context_now(cfg: Recipe, written: Context, given: Given = NOTHING) -> Context:
    """What a checkpoint that was `written` would say now of what this recipe names: code, data, an adapter."""
    rows = {name: given.rows(name, data) for name, data in data_of(cfg).items() if given.is_local(name, data)}
    return context(cfg, written.adapter, written.plan, written.revisions, rows, given)


def changes(old: Context, new: Context) -> list[str]:
    """What a run would go on with that its checkpoint was not written with, a line for each.

    Settings without influence on the run's numbers are left out.
    """
    was, now = dict(_settings(old)), dict(_settings(new))
    return [
        f"{name}: {_written(was.get(name, 'not set'))} → {_written(now.get(name, 'not set'))}"
        for name in dict.fromkeys([*was, *now])
        if was.get(name, "not set") != now.get(name, "not set")
    ]


def _written(value: Any) -> str:
    """A value as a recipe has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _settings(written: Context) -> Iterator[tuple[str, Any]]:
    recipe = _with_defaults(read_written(written.recipe))
    yield from ((name, value) for name, value in _flat(recipe, "") if not _without_influence(name))
    if recipe.get("ranks"):  # that there is the section, whatever its numbers
        yield "ranks", "sample and train apart"
    for use, digest in written.sources.items():
        yield f"code of {use}", digest[:12]
    for setting, digest in written.inputs.items():
        yield f"contents of {setting}", digest[:12]


def _without_influence(setting: str) -> bool:
    return f"{setting}.".startswith(tuple(f"{name}." for name in WITHOUT_INFLUENCE))


def _with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as it was written, with the defaults of the settings that have come since."""
    try:
        return Recipe.model_validate_json(json.dumps(without_single_turn(recipe))).model_dump(mode="json")
    except ValidationError:  # it has settings that have gone: these are differences
        return recipe


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A tree's leaves by their dotted names."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
        return
    for key, inner in items:
        yield from _flat(inner, f"{name}.{key}" if name else str(key))


def _newer(checkpoint: Path) -> list[str]:
    """Packages that are not what they were: then the last bits of the numbers may differ."""
    installed = versions()
    return [
        f"{name} is {now} and was {was} when the checkpoint was written: numbers may differ in their last bits"
        for name, was in read_state(checkpoint)["versions"].items()
        if (now := installed[name]) != was
    ]
