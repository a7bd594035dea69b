"""`grpo report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo.errors import UserError


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN", help="Folders of runs. The plots of several runs are overlaid. Default: the newest in runs/."
        ),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="File to write. Default: report.html in the first run.")] = None,
) -> None:
    """Write an HTML report of runs: summary, linked plots, tables, and completions to search and compare.

    The report is a single file, and needs no network."""
    from grpo.telemetry.recorded import named_or_newest, read_run
    from grpo.telemetry.report import report as page

    folders = named_or_newest(runs)
    text = page([read_run(folder) for folder in folders])
    target = to or folders[0] / "report.html"
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    print(target)
