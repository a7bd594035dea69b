"""`grpo recipes`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from grpo.cli.commands import Group, TakesSettings
from grpo.config.describe import json_schema, settings
from grpo.errors import UserError
from grpo.plugins import bundled, bundled_names, find_recipe
from grpo.recipe import load_recipe

app = typer.Typer(cls=Group, help="Recipes that come with the package.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """Name each bundled recipe and say what it does."""
    for name in bundled_names("recipes", ".yaml"):
        first_line = (bundled("recipes") / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:<20} {first_line.lstrip('# ')}")


@app.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="A bundled recipe's name.")],
    to: Annotated[Path | None, typer.Argument(help="Where to put it. Default: here, under its own name.")] = None,
) -> None:
    """Copy a bundled recipe, to make it your own."""
    source = find_recipe(name)
    target = to or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target} exists already")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    print(target)


@app.command("schema")
def schema(
    key: Annotated[str, typer.Argument(help="Only this section or key, such as rollout or loss.beta.")] = "",
    json_: Annotated[bool, typer.Option("--json", help="The whole as JSON Schema, for an editor.")] = False,
) -> None:
    """Print every key that a recipe may have, with its type, its default and what it means."""
    if json_:
        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return
    for setting in settings(key):
        print("\n".join(setting.lines()))


@app.command("costs", cls=TakesSettings)
def costs(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of a bundled one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="As for `grpo train`.")
    ] = None,
) -> None:
    """Estimate what a recipe takes on some named machines: memory, and the least time. No weights are fetched."""
    from grpo.benchmark.estimate import estimates

    print("\n".join(estimates(load_recipe(find_recipe(recipe), overrides or []))))
