"""`grpo generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from grpo.tools.generate import Answering


def generate(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, or a model as in recipes.")],
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt's text; of a run, what its template is filled with.")
    ] = None,
    row: Annotated[
        int | None,
        typer.Option(min=0, help="A row of the run's data in the place of a prompt, for runs with an environment."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter's folder. Default: the newest checkpoint of the run.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model, without any adapter.")] = False,
    no_template: Annotated[bool, typer.Option("--no-template", help="Leave the run's template out.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many tokens. Default: the run's limit, or 512.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=0, help="Sample from the K most likely tokens. 0: from all.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens that make up this probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Sample from tokens that have this share of the likeliest token's probability."
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.01, help="Make tokens that came before less likely. 1: off.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text and not at the run's. Repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws, above temperature 0.")] = 0,
) -> None:
    """Answer a prompt, and show the text as it comes.

    A run answers as it did in training: with its template, its system message, its stops and its longest length, and
    above temperature 0 with its way of sampling. A run with tools or an environment has a conversation with them: what
    is said, called and answered is shown turn by turn.
    """
    from grpo.errors import UserError
    from grpo.tools.generate import find_answering

    if temperature == 0 and (top_k or (top_p is not None and top_p < 1) or min_p):
        raise UserError("--top-k, --top-p and --min-p do nothing at temperature 0, which is greedy: --temperature 1")
    if "" in (stop or ()):
        raise UserError("--stop: an empty text would end the answer at its first token")
    given = {
        "temperature": temperature,
        "max_tokens": max_tokens,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": tuple(stop) if stop else None,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    _print_answer(find_answering(target, adapter, base, not no_template), prompt, row, asked, seed)


def _print_answer(found: Answering, prompt: str | None, row: int | None, asked: dict[str, Any], seed: int) -> None:
    """Print an answer as it comes, or a conversation turn by turn."""
    from grpo.errors import UserError
    from grpo.tools.converse import converse
    from grpo.tools.generate import answer

    if found.conversations:
        converse(found, prompt, row, asked, seed, lambda line: print(line, flush=True))
        return
    if row is not None:
        raise UserError("--row is for runs with an environment or tools; give a prompt")
    if prompt is None:
        raise UserError("give a prompt: grpo generate TARGET PROMPT")
    for text in answer(found, prompt, asked, seed):
        print(text, end="", flush=True)
    print()
