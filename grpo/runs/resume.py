"""Where a run starts or resumes: from which checkpoint, and whether recipe, code and data are still the same."""

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
    """Where a run begins: at step 0 or at the state of a checkpoint, in a new folder or in that of the resumed run.

    goes_on    whether the run continues in the folder of the run that it resumes
    notes      messages about the start
    plan       values chosen for `auto` settings when the resumed run began
    revisions  commits on the Hub that the resumed run was trained from
    """

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
        """The recipe with the revisions and `auto` values of the resumed run, and without files of solve rates that are
        missing and not needed."""
        gone = [] if self.state is None else gone_rates(self.cfg.data, self.state)
        cfg = with_rates(self.cfg, dict.fromkeys(gone))
        return as_planned(with_revisions(cfg, self.revisions), self.plan)

    def load(self, trainer: Trainer) -> RunState:
        """Load the starting state into the trainer and return it.

        Raises UserError if the state does not fit the trainer, if there is no task to begin with, or if processes would
        start from different states.
        """
        trainer.ranks.check_same("the recipe", trainer.cfg.model_dump(exclude={"output_dir"}))
        trainer.ranks.check_same("the step to resume after", self.state.step if self.state else 0)
        if self.state is None:
            check_begins(trainer.tasks)
            return RunState(run_id=_new_id(), trainer=TrainerState({}, trainer.counts()))  # the trainer has the arrays
        trainer.load_state(self.state.trainer, consume=True)
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
    """Find where a run with this recipe begins.

    With `resume`, it resumes from the newest intact checkpoint in its folder, or begins at step 0 if there is none yet.
    With a `checkpoint`, it resumes from this checkpoint: in the folder of the checkpoint's run, which forgets later
    steps, or as a branch in a new folder. A `dry` run changes nothing; a note says how to train despite a run in its
    folder.

    Raises UserError for a recipe that contains a secret, for a folder that already holds a run, if every checkpoint is
    damaged, and if recipe, code or data differ from those of the checkpoint, unless they may have `changed`.
    """
    assert cfg.output_dir is not None
    check_no_secrets(cfg)
    folder = Path(cfg.output_dir)
    if checkpoint is not None:
        _check_named(checkpoint)
    same_folder = checkpoint is None or checkpoint.resolve().parent == (folder / CHECKPOINTS).resolve()
    goes_on = (resume or changed or checkpoint is not None) and same_folder
    if goes_on and overwrite:
        raise UserError("--overwrite replaces the run, --resume continues it: choose one of them")
    check_run_folder(cfg, overwrite or goes_on, dry)
    in_the_way = dry and is_run(folder) and not (overwrite or goes_on or failed_at_once(folder))
    goes_on = goes_on and is_run(folder)
    notes: list[str] = []
    if checkpoint is None and goes_on:
        if not dry:
            restore_replaced(folder / CHECKPOINTS)
        checkpoint, notes = newest_whole(folder / CHECKPOINTS)
        if notes and checkpoint is None:
            raise UserError(f"{folder}: every checkpoint is damaged, so the run cannot resume: " + "; ".join(notes))
    cfg = with_kept(cfg, checkpoint.resolve().parents[1] if checkpoint is not None else folder)
    if checkpoint is None:
        notes = ["no checkpoint to resume from: begins at step 0"] if resume or changed else []
        if in_the_way:
            notes = [f"{folder} holds a run: training needs --resume, --overwrite or another output_dir"]
        return Start(cfg, goes_on=goes_on, overwrite=overwrite, notes=tuple(notes))
    state, written = load_checkpoint(checkpoint)
    cfg = _with_former_rates(cfg, state, written)
    differences = changes(written, context_now(cfg, written, given))
    if differences and not changed:
        listed = "\n".join(f"  {line}" for line in differences)
        what = "was written with another recipe, other code or other data"
        raise UserError(f"{checkpoint} {what}; --resume-changed resumes anyway:\n{listed}")
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
"""Settings that affect neither sampling nor learning. A resumed run may change them without --resume-changed."""

COMPARED = ("model.", "data.", "rewards.", "rollout.", "environment", "tools", "code of ", "contents of ")
"""Beginnings of those differences that make rewards of earlier and later steps incomparable, and kept groups unlike
the groups that the changed run would sample."""


def _with_former_rates(cfg: Recipe, state: RunState, written: Context) -> Recipe:
    """The recipe with the full paths that missing files of solve rates had in the checkpoint's recipe, if the files are
    not needed: a relative path is resolved only if the file exists."""
    data = read_written(written.recipe)["data"]
    before = dict(zip(cfg.data.parts, data.get("sources") or [data], strict=False))
    former = {name: before.get(name, {}).get("solve_rates") for name in gone_rates(cfg.data, state)}
    named = {name: str(part.solve_rates) for name, part in cfg.data.parts.items()}
    return with_rates(cfg, {name: file for name, file in former.items() if file and Path(file).match(named[name])})


def _goes_on(steps: int, made: int, checkpoint: Path) -> str:
    """The note for a run of `steps` steps that resumes from a checkpoint after step `made`."""
    if made < steps:
        return f"resumes after step {made} from {checkpoint}"
    return (
        f"no steps left to train: optim.steps is {steps}, and {checkpoint} was written after step {made}. To train "
        "further, raise optim.steps (it counts from the run's first step) and use --resume-changed, or changed=True in "
        "Python"
    )


def _check_named(checkpoint: Path) -> None:
    """Raise UserError if `checkpoint` does not exist, or is a run instead of a checkpoint."""
    if not checkpoint.is_dir():
        raise UserError(f"--resume-from {checkpoint}: there is no such folder")
    if is_run(checkpoint):
        raise UserError(
            f"--resume-from {checkpoint}: is a run; name its checkpoint, such as {newest_checkpoint(checkpoint)}"
        )


def as_planned(cfg: Recipe, plan: Mapping[str, Any]) -> Recipe:
    """The recipe with the values of a former plan instead of `auto`.

    A plan is a measurement: a new plan may cut micro-batches differently, and sums would differ in their last bits.
    """
    optim = "micro_batch_tokens", *(() if cfg.model.shard == "fsdp" else ("gradient_checkpointing",))
    decided = {f"optim.{name}": plan[name] for name in optim if name in plan and getattr(cfg.optim, name) == "auto"}
    return with_settings(cfg, decided)


def _new_id() -> str:
    """An id for a run, also in W&B: $WANDB_RUN_ID (set by the agent of a sweep, for example), or else a random one."""
    return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)


def plan_of(trainer: Trainer) -> dict[str, Any]:
    """The values that were chosen for settings that may be `auto`."""
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
    """What this recipe's checkpoints record about their run. `rows` are hashed if they are local; for others the
    revision is enough."""
    named = data_of(cfg)
    inputs = {name: fingerprint(table) for name, table in rows.items() if given.is_local(name, named[name])}
    sources = source_hashes(cfg.uses) | given.sources()
    inputs |= adapter_hashes(cfg) | rates_hash(cfg.data)
    return Context(recipe_text(cfg), sources, adapter, plan, revisions, inputs)


def context_now(cfg: Recipe, written: Context, given: Given = NOTHING) -> Context:
    """What the `written` checkpoint would record now about the code, data and adapters that this recipe names."""
    rows = {name: given.rows(name, data) for name, data in data_of(cfg).items() if given.is_local(name, data)}
    return context(cfg, written.adapter, written.plan, written.revisions, rows, given)


def changes(old: Context, new: Context) -> list[str]:
    """The differences between a checkpoint's context and the context of the run that resumes from it, a line for each.

    Settings without influence on the run's numbers are left out.
    """
    was, now = dict(_settings(old)), dict(_settings(new))
    return [
        f"{name}: {_written(was.get(name, 'not set'))} → {_written(now.get(name, 'not set'))}"
        for name in dict.fromkeys([*was, *now])
        if was.get(name, "not set") != now.get(name, "not set")
    ]


def _written(value: Any) -> str:
    """A value as text, as a recipe would show it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _settings(written: Context) -> Iterator[tuple[str, Any]]:
    recipe = _with_defaults(read_written(written.recipe))
    yield from ((name, value) for name, value in _flat(recipe, "") if not _without_influence(name))
    if recipe.get("ranks"):  # only the presence of the section matters, not its numbers
        yield "ranks", "sample and train apart"
    for use, digest in written.sources.items():
        yield f"code of {use}", digest[:12]
    for setting, digest in written.inputs.items():
        yield f"contents of {setting}", digest[:12]


def _without_influence(setting: str) -> bool:
    return f"{setting}.".startswith(tuple(f"{name}." for name in WITHOUT_INFLUENCE))


def _with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A written recipe, with the defaults of settings that were added since."""
    try:
        return Recipe.model_validate_json(json.dumps(without_single_turn(recipe))).model_dump(mode="json")
    except ValidationError:  # it has settings that no longer exist: they are differences
        return recipe


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each leaf of a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
        return
    for key, inner in items:
        yield from _flat(inner, f"{name}.{key}" if name else str(key))


def _newer(checkpoint: Path) -> list[str]:
    """Notes on packages whose version has changed since the checkpoint was written."""
    installed = versions()
    return [
        f"{name} is {now} and was {was} when the checkpoint was written: numbers may differ in their last bits"
        for name, was in read_state(checkpoint)["versions"].items()
        if (now := installed[name]) != was
    ]
