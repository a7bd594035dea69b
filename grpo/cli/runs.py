"""`grpo runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder to search for runs.")] = Path("runs"),
    follow: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Show this run live, from the files in its folder.")
    ] = None,
) -> None:
    """List the runs in a folder, with state, step, reward and best evaluation."""
    from rich.console import Console

    from grpo.telemetry.console import print_wrapped
    from grpo.telemetry.recorded import errors_of, find_runs, runs_table
    from grpo.telemetry.recorded import follow as show

    if follow is not None:
        show(follow, Console())
    elif found := find_runs(folder):
        Console().print(runs_table(found))
        for line in errors_of(found):
            print_wrapped(Console(), line)
    else:
        print(f"no runs in {folder}")
