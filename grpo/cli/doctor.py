"""`grpo doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, for a bug report.")] = False,
    ranks: Annotated[
        bool,
        typer.Option(
            "--ranks",
            help="Check the links between processes instead: latency and bandwidth by message size. Start it like a "
            'run: mlx.launch --hostfile hosts.json -- "$(which grpo)" doctor --ranks; or use --hostfile.',
        ),
    ] = False,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="With --ranks: check this hostfile of mlx.launch, and start its processes."),
    ] = None,
) -> None:
    """Check the machine, packages, services and folders that a run needs, and say what to do about each problem.

    Prints one line per check: ok, warn or fail, what was found, and the remedy. Exits with 1 if a check fails.
    """
    from grpo.doctor.checks import CHECKS, report
    from grpo.doctor.launching import report_ranks
    from grpo.errors import UserError

    if hostfile is not None and not ranks:
        raise UserError("--hostfile requires --ranks: add --ranks")
    raise typer.Exit(report_ranks(hostfile, json) if ranks else report(CHECKS, json))
