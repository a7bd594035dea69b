"""`grpo train`."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from grpo.plugins import find_recipe
from grpo.recipe import load_recipe


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of a bundled one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that replace the recipe's."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, train nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that output_dir holds.")] = False,
) -> None:
    """Train an adapter, or the weights themselves, with GRPO, as a recipe says."""
    cfg = load_recipe(find_recipe(recipe), overrides or [])

    from rich.console import Console

    from grpo.backend import device
    from grpo.backend.ranks import Ranks
    from grpo.data.prompts import last_text
    from grpo.telemetry.loggers import open_loggers
    from grpo.telemetry.summary import print_outcome, print_plan
    from grpo.training.folder import check_run_folder, run_folder
    from grpo.training.parity import check_parity
    from grpo.training.setup import prepare
    from grpo.training.signals import StopRequest

    first = Ranks.launched().first  # of several processes one talks and writes
    console = Console(quiet=not first)
    if first:
        check_run_folder(cfg, overwrite)
    with console.status("loading"):
        run = prepare(cfg)
    print_plan(console, cfg, device.describe(), run.plan, run.notes)
    if dry_run:
        return
    trainer = run.trainer
    parity = check_parity(trainer.policy, trainer.engine, run.tasks[:4], cfg.seed)
    console.print(parity, highlight=False, soft_wrap=True)
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder(cfg, overwrite)) if first else Path(str(cfg.output_dir))
        log = open_loggers(stack, cfg, folder, console) if first else lambda _: None
        stop = stack.enter_context(StopRequest(lambda: console.print("stopping at the end of this step")))
        outcome = trainer.run(folder, log, stop)
    print_outcome(console, outcome, folder, last_text(run.tasks[0].prompt))
    if outcome.stopped_by is not None:
        raise typer.Exit(128 + signal.Signals(outcome.stopped_by))
