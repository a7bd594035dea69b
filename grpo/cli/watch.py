"""`grpo watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs' folders, running or ended.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8650,
) -> None:
    """Show the report of runs live, in a browser on this machine.

    The page is `grpo report`'s, and follows the runs as they go on: plots, tables, alarms and completions. It only
    reads, and only this machine can open it; from another, go through `ssh -L 8650:127.0.0.1:8650 HOST`.
    """
    from grpo.telemetry.live import watch as show

    show(runs, port, lambda line: print(line, flush=True))
