"""`grpo runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look for runs.")] = Path("runs"),
    follow: Annotated[Path | None, typer.Option(metavar="RUN", help="Show this run live, from its records.")] = None,
) -> None:
    """List the runs of a folder: state, step, reward, best evaluation."""
    from rich.console import Console

    from grpo.telemetry.recorded import find_runs, runs_table
    from grpo.telemetry.recorded import follow as show

    if follow is not None:
        show(follow, Console())
    elif found := find_runs(folder):
        Console().print(runs_table(found))
    else:
        print(f"no runs in {folder}")
