"""`grpo watch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN", help="Folders of runs, running or ended. Default: the newest in runs/."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0: any free port.")] = 8650,
) -> None:
    """Show the report of runs live, in a browser on this machine.

    The page is the same as from `grpo report`, and updates while the runs continue: plots, tables, alarms and
    completions. It only reads, and only this machine can open it. From another machine, use
    `ssh -L 8650:127.0.0.1:8650 HOST`.
    """
    from grpo.telemetry.live import watch as show
    from grpo.telemetry.recorded import named_or_newest

    show(named_or_newest(runs), port, lambda line: print(line, flush=True))
