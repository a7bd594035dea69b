"""`grpo eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN|RECIPE|MODEL", help="A run's folder, a recipe, or a model.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY.SUB=VALUE", help="Settings that replace the recipe's: rollout.temperature=0.6"),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Prompts to evaluate on. Default: the recipe's.")] = None,
    split: Annotated[
        str | None, typer.Option(help="The split of these prompts. Default: test; a file is one split.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="As data.prompt: a column, or a template.")] = None,
    reward: Annotated[
        str | None, typer.Option(help="The reward that grades. Default: the recipe's first; math_answer for a model.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Completions of each prompt, besides a greedy one.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="How many prompts, from the start.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="An adapter's folder, to be compared with its base.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="A run's checkpoint: newest (the default), best, or a step.")
    ] = None,
    solve_rates: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write how often each prompt was solved: for data.solve_rates of a recipe."),
    ] = None,
) -> None:
    """Measure greedy, avg@k, pass@k and maj@k on held-out prompts, with 95 % intervals.

    Of a run: its newest checkpoint beside what it started from (its base model, or the adapter of adapter.path), on the
    same prompts. Of a recipe or a model: the model, and beside it an adapter if one is named.

    With --solve-rates, the rates are of the samples of the adapter, or of the model where there is no adapter. To
    choose training prompts by them, measure the training split: --split train --prompts 10000.
    """
    from rich.console import Console

    from grpo.backend.ranks import Ranks
    from grpo.telemetry.console import before_and_after, single
    from grpo.tools.evaluate import EvalOptions, measure

    asked = EvalOptions(data, split, prompt, reward, samples, prompts, adapter, checkpoint, solve_rates)
    ranks = Ranks.launched()
    found = measure(target, asked, overrides or [])
    table = before_and_after(found.before, found.after, found.started) if found.after else single(found.before)
    console = Console(quiet=not ranks.first)
    for note in found.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    if solve_rates is not None:
        console.print(f"solve rates: {solve_rates}", highlight=False, markup=False, soft_wrap=True)
    ranks.finish()  # all have said what they have to say
