"""`grpo train`."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from grpo.config import Recipe
from grpo.plugins import find_recipe
from grpo.recipes import load_recipe


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of a bundled one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY.SUB=VALUE",
            help="Settings that replace the recipe's: optim.steps=10, rewards.0.weight=2, loss='{type: gspo}'. Values "
            "are YAML. `grpo recipes schema` prints every key with its default and meaning.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check all that a run would, print the plan, train nothing and write nothing."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that output_dir holds.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the newest whole checkpoint of the run in output_dir.")
    ] = False,
    resume_from: Annotated[
        Path | None, typer.Option(help="Go on after this checkpoint: of the run in output_dir, or into a new folder.")
    ] = None,
    resume_changed: Annotated[
        bool, typer.Option("--resume-changed", help="Go on though the recipe or its code has changed.")
    ] = False,
) -> None:
    """Train an adapter, or the weights themselves, with GRPO, as a recipe says."""
    cfg = load_recipe(find_recipe(recipe), overrides or [])

    from rich.console import Console

    from grpo.backend import device
    from grpo.backend.ranks import Ranks
    from grpo.data.prompts import last_text
    from grpo.errors import RunError
    from grpo.planning.parity import check_parity
    from grpo.runs.loop import Loop
    from grpo.runs.prepare import prepare
    from grpo.runs.resume import context, find_start, plan_of
    from grpo.runs.revisions import revisions_of
    from grpo.runs.signals import StopRequest
    from grpo.scoring.rehearsal import rehearse
    from grpo.telemetry.loggers import find_loggers, open_loggers
    from grpo.telemetry.summary import failure_lines, print_outcome, print_plan
    from grpo.training.packing import Packing

    ranks = Ranks.launched()
    console = Console(quiet=not ranks.first)  # of several processes one talks and writes
    start = find_start(cfg, resume, resume_from, resume_changed, overwrite, dry_run)
    cfg = start.cfg
    own = find_loggers(cfg.log)
    ranks.wait()  # all have looked before the first one makes the folder
    with console.status("loading"):
        run = prepare(start.planned)
    trainer = run.trainer
    with ExitStack() as stack:
        stack.callback(trainer.scorer.close)
        notes = [*run.notes, *start.notes, *_unsent(cfg)]
        print_plan(console, cfg.model, cfg.data, cfg.rewards, device.describe(), run.plan, notes)
        state = start.load(trainer)
        packing = Packing.of(trainer.cfg.optim, trainer.cfg.rollout)
        parity = ranks.checked(lambda: check_parity(trainer.policy, trainer.engine, run.tasks[:4], cfg.seed, packing))
        console.print(parity, highlight=False, soft_wrap=True)
        if dry_run:
            for note in rehearse(trainer.scorer, run.tasks, trainer.engine.generator.tokenizer.encode):
                console.print(note, highlight=False, markup=False, soft_wrap=True)
            return
        written = context(cfg, trainer.policy.adapters.config, plan_of(trainer), revisions_of(trainer.cfg), run.rows)
        folder = stack.enter_context(start.folder()) if ranks.first else Path(str(cfg.output_dir))
        watched = (trainer.engine.generator, trainer.scorer, trainer.update)
        resumed = state if start.goes_on else None
        opened = open_loggers(stack, cfg, folder, console, state.run_id, watched, own, resumed) if ranks.first else None
        log = opened or (lambda _: None)
        stop = stack.enter_context(StopRequest(lambda: console.print("stopping; once more ends it at once")))
        loop = Loop(trainer, folder, written, log, stop, state, start.checkpoint, run.evaluator)
        del start, state, resumed  # or the arrays that the run began with would be held to its end
        outcome = loop.run()
    failures = failure_lines(ranks.sum_counts(trainer.scorer.failures), ranks.sum_counts(trainer.scorer.timeouts))
    print_outcome(console, outcome, folder, last_text(run.tasks[0].prompt), failures)
    ranks.wait()  # a launcher ends the others, the first one in the middle of its checkpoint, when one is gone
    if outcome.untrained is not None:
        raise RunError(outcome.untrained) if ranks.first else typer.Exit(1)
    if outcome.stopped_by is not None:
        raise typer.Exit(128 + signal.Signals(outcome.stopped_by))


def _unsent(cfg: Recipe) -> list[str]:
    """A line where W&B is to get the run and nobody is logged in: the run stays in its folder then."""
    from grpo.doctor.services import wandb

    if cfg.log.wandb is None or cfg.log.wandb.mode == "offline" or (found := wandb()).status == "ok":
        return []
    why = found.text.removesuffix(", which only log.wandb wants")
    return [f"W&B: {why}: the run stays in its folder for `wandb sync`, unless you see to it first: {found.remedy}"]
