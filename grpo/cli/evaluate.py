"""`grpo eval`."""

from __future__ import annotations

from typing import Annotated

import typer


def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|RECIPE", help="A run's folder, or a recipe (its base model).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that replace the recipe's: eval.samples=16"),
    ] = None,
) -> None:
    """Measure the held-out accuracy of a run or a recipe.

    Of a run: its newest checkpoint beside its base model. Of a recipe: its model.
    """
    from rich.console import Console

    from grpo.telemetry.console import before_and_after, single
    from grpo.training.measure import measure

    console = Console()
    before, after = measure(target, overrides or [])
    console.print(before_and_after(before, after) if after else single(before))
