"""`grpo doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the same as JSON, for a bug report.")] = False,
    ranks: Annotated[
        bool,
        typer.Option(
            "--ranks",
            help="Look at the links between processes instead: latency and bandwidth by size. Start it as you start a "
            'run: mlx.launch --hostfile hosts.json -- "$(which grpo)" doctor --ranks; or give it the hostfile.',
        ),
    ] = False,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="With --ranks: check this hostfile of mlx.launch, and start the processes by it."),
    ] = None,
) -> None:
    """Look at the machine, the packages, the services and the folders that a run needs, and say what to do about them.

    One line each: ok, warn or fail, what was found, and the remedy. Exits with 1 if anything fails.
    """
    from grpo.doctor.checks import CHECKS, report
    from grpo.doctor.launching import report_ranks
    from grpo.errors import UserError

    if hostfile is not None and not ranks:
        raise UserError("--hostfile is for `grpo doctor --ranks`")
    raise typer.Exit(report_ranks(hostfile, json) if ranks else report(CHECKS, json))
