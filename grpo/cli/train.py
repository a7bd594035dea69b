"""`grpo train`."""

from __future__ import annotations

import shlex
import signal
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from grpo.plugins import find_recipe
from grpo.recipes import load_recipe


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of a bundled recipe.")],
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
        typer.Option(
            "--dry-run", help="Do all checks of a run and print the plan, but train nothing and write nothing."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in output_dir from its newest complete checkpoint.")
    ] = False,
    resume_from: Annotated[
        Path | None, typer.Option(help="Resume from this checkpoint, in its run's output_dir or in a new folder.")
    ] = None,
    resume_changed: Annotated[
        bool, typer.Option("--resume-changed", help="Resume even if the recipe or its code has changed.")
    ] = False,
) -> None:
    """Train an adapter, or the weights themselves, with GRPO, from a recipe."""
    cfg = load_recipe(find_recipe(recipe), overrides or [])

    from rich.console import Console

    from grpo.backend.ranks import Ranks
    from grpo.door.opening import How, Opening
    from grpo.errors import RunError
    from grpo.runs.checkpoint import RECIPE
    from grpo.runs.signals import StopRequest

    first = Ranks.launched().first
    console = Console(quiet=not first)  # only rank 0 prints and writes
    opening = Opening(cfg, How(resume, resume_from, resume_changed, overwrite, dry_run), console)
    with closing(opening.run.opened):
        opening.check()
        if dry_run:
            opening.rehearse()
            console.print("all checks passed; nothing was trained and nothing was written")
            return
        stop = StopRequest(lambda: console.print("stopping; a second signal stops the run immediately"))
        with opening.loop(stop) as loop:
            outcome = loop.run()
    # The stored recipe includes the command line's settings.
    go_on = f"grpo train {shlex.quote(str(opening.folder / RECIPE))} --resume"
    opening.finish(outcome, go_on)
    if outcome.untrained is not None:
        raise RunError(outcome.untrained) if first else typer.Exit(1)
    if outcome.stopped_by is not None:
        raise typer.Exit(128 + signal.Signals(outcome.stopped_by))
