"""`grpo report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo.errors import UserError


def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Folders of runs. The plots of several are overlaid.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="File to write. Default: report.html in the first run.")] = None,
) -> None:
    """Write an HTML report of runs: summary, linked plots, tables, and completions to search and compare.

    The report is a single file, and needs no network."""
    from grpo.telemetry.recorded import ask_for_a_run, read_run
    from grpo.telemetry.report import report as page

    if not runs:
        raise ask_for_a_run("report")
    text = page([read_run(run) for run in runs])
    target = to or runs[0] / "report.html"
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    print(target)
