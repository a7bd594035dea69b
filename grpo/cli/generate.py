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
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many most likely tokens. 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="… that together reach this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="… at least so likely, against the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="Against tokens that came before. 1: off.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be given more than once.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws, above temperature 0.")] = 0,
) -> None:
    """Answer a prompt, and show the text as it comes."""
    from grpo.errors import UserError
    from grpo.generation.sampling import Sampling
    from grpo.training.answer import answer

    if temperature == 0 and (top_k or top_p < 1 or min_p):
        raise UserError("--top-k, --top-p and --min-p do nothing at temperature 0, which is greedy: --temperature 1")
    if "" in (stop or ()):
        raise UserError("--stop: an empty text would end the answer at its first token")
    sampling = Sampling(
        temperature, max_tokens, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
    )  # fmt: skip
    for text in answer(target, prompt, adapter, base, sampling, seed):
        print(text, end="", flush=True)
    print()
