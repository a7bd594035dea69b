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
    data: Annotated[str | None, typer.Option(help="Prompts to evaluate on. Default: the recipe's prompts.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of these prompts. Default: test. A file has a single split.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="A column or a template, like data.prompt.")] = None,
    reward: Annotated[
        str | None,
        typer.Option(help="The reward that grades. Default: the recipe's first reward; for a model, math_answer."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Completions sampled for each prompt, in addition to a greedy completion.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Number of prompts, from the start.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of an adapter, to compare with its base model.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint of a run: newest (the default), best, or a step.")
    ] = None,
    solve_rates: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write how often each prompt was solved to FILE, for data.solve_rates in a recipe."
        ),
    ] = None,
) -> None:
    """Measure greedy, avg@k, pass@k and maj@k on held-out prompts, with 95 % intervals.

    For a run, compares its newest checkpoint with its start (the base model, or the adapter in adapter.path) on the
    same prompts. For a recipe or a model, measures the model, and compares it with --adapter if you give an adapter.

    --solve-rates writes rates from the samples of the adapter, or of the model if there is no adapter. To choose
    training prompts by these rates, measure the training split: --split train --prompts 10000.
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
    ranks.finish()  # wait until all processes are done
