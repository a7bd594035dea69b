"""`grpo export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ExportFormat(StrEnum):
    mlx = "mlx"
    peft = "peft"
    fused = "fused"


class Quantized(StrEnum):
    two = "2"
    three = "3"
    four = "4"
    five = "5"
    six = "6"
    eight = "8"
    mxfp4 = "mxfp4"
    nvfp4 = "nvfp4"
    mxfp8 = "mxfp8"


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="An adapter for mlx-lm (mlx) or PEFT (peft), or the model with the adapter fused in (fused)."
        ),
    ],
    to: Annotated[Path | None, typer.Option(help="Folder to write. Default: RUN/export-FORMAT.")] = None,
    checkpoint: Annotated[str, typer.Option(help="Checkpoint to export: newest, best, or a step.")] = "newest",
    quantize: Annotated[
        Quantized | None, typer.Option(help="With fused: bits of the quantized weights, or their format.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Also upload the folder to this Hub repository.")
    ] = None,
) -> None:
    """Export a run's adapter for use in other programs, with a model card."""
    from grpo.tools.export import export as write
    from grpo.tools.export import push

    asked = None if quantize is None else int(quantize) if quantize.isdecimal() else quantize.value
    made = write(run, format.value, to, checkpoint, asked, push_to_hub)
    for line in [*made.notes, str(made.folder)]:
        print(line)
    if push_to_hub:
        print(push(made.folder, push_to_hub))
