"""`grpo generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, or a model as in recipes.")],
    prompt: Annotated[str, typer.Argument(help="The prompt's text.")],
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter's folder. Default: the newest checkpoint of the run.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model, without any adapter.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, above temperature 0.")] = 0,
) -> None:
    """Answer a prompt, and show the text as it comes."""
    from grpo.training.answer import answer

    for text in answer(target, prompt, adapter, base, max_tokens, temperature, seed):
        print(text, end="", flush=True)
    print()
