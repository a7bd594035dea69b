"""`grpo recipes`."""

from __future__ import annotations

import json
import re
import shutil
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from grpo.cli.commands import CommandGroup, TakesSettings
from grpo.config.describe import json_schema, settings
from grpo.errors import UserError
from grpo.plugins import bundled, bundled_names, find_recipe
from grpo.recipes import load_recipe

MOST = 1e6
"""Upper bound of gigabytes, gigabytes per second, and Tflop/s: more than any machine has."""

app = typer.Typer(
    cls=CommandGroup, help="Recipes that come with grpo, and the settings of a recipe.", no_args_is_help=True
)


class ChipBackend(Enum):
    """MLX's backend on the described machine."""

    cuda = "cuda"
    metal = "metal"


@app.command("list")
def list_() -> None:
    """List the bundled recipes, with what each does."""
    for name in bundled_names("recipes", ".yaml"):
        first_line = (bundled("recipes") / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:<20} {first_line.lstrip('# ')}")


@app.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="Name of a bundled recipe.")],
    to: Annotated[
        Path | None, typer.Argument(help="File or folder to write. Default: this folder, under the recipe's name.")
    ] = None,
) -> None:
    """Copy a bundled recipe, and the Python files that it names, for you to change."""
    source = find_recipe(name)
    target = to or Path(source.name)
    target = target / source.name if target.is_dir() else target
    copies = {source: target, **{file: target.parent / file.name for file in _files_of(source)}}
    for copied in copies.values():
        if copied.exists():
            raise UserError(f"{copied} exists already: choose another place")
    for original, copied in copies.items():
        try:
            shutil.copyfile(original, copied)
        except OSError as error:
            raise UserError(f"cannot write {copied}: {error.strerror}") from None
        print(copied)


def _files_of(recipe: Path) -> list[Path]:
    """Return the Python files in the recipe's folder that the recipe names."""
    named = re.findall(r"[\w-]+\.py\b", recipe.read_text(encoding="utf-8"))
    return sorted({recipe.parent / name for name in named if (recipe.parent / name).is_file()})


@app.command("schema")
def schema(
    key: Annotated[str, typer.Argument(help="Only this section or key, such as rollout or loss.beta.")] = "",
    json_: Annotated[
        bool, typer.Option("--json", help="Print the whole schema as JSON Schema, for an editor.")
    ] = False,
) -> None:
    """Print every key that a recipe may have, with its type, default and meaning."""
    if json_:
        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return
    for setting in settings(key):
        print("\n".join(setting.lines()))


@app.command("costs", cls=TakesSettings)
def costs(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of a bundled recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE", help="As for `grpo train`.")] = None,
    memory: Annotated[
        float | None,
        typer.Option(min=1, max=MOST, help="Estimate for a machine with this memory: gigabytes, as advertised."),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            min=1, max=MOST, help="With --memory: memory bandwidth in gigabytes per second, to estimate times."
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=MOST,
            help="With --bandwidth: dense bfloat16 Tflop/s. Default: 75 per TB/s on CUDA, 30 on Metal.",
        ),
    ] = None,
    backend: Annotated[
        ChipBackend, typer.Option(help="With --memory: an NVIDIA card (cuda) or a Mac (metal).")
    ] = ChipBackend.cuda,
) -> None:
    """Estimate a recipe's memory and time on common machines, or on a machine that you describe, with the longest
    completion that would fit there. Downloads no weights."""
    from grpo.planning.estimate import estimates, legend, report
    from grpo.planning.machines import CHIPS, described, memory_of

    if memory is None and (bandwidth is not None or backend is not ChipBackend.cuda):
        raise UserError("costs: --bandwidth and --backend have no effect without --memory: add --memory")
    if bandwidth is None and tflops is not None:
        raise UserError("costs: --tflops has no effect without --bandwidth: add --bandwidth")
    cfg = load_recipe(find_recipe(recipe), overrides or [])
    chips = list(CHIPS) if memory is None else []
    if memory is not None and bandwidth is not None:
        chips = [described(memory, bandwidth, tflops, backend.value)]
    lines = [*estimates(cfg, chips), *legend(chips)]
    if memory is not None:
        lines += report(cfg, memory_of(memory, backend.value), backend.value)
    print("\n".join(lines))
