"""`grpo doctor`."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the same as JSON, for a bug report.")] = False,
) -> None:
    """Look at the machine, the packages, the services and the folders that a run needs, and say what to do about them.

    One line each: ok, warn or fail, what was found, and the remedy. Exits with 1 if anything fails.
    """
    from grpo.doctor.checks import CHECKS, report

    raise typer.Exit(report(CHECKS, json))
