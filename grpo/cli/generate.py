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
        str | None, typer.Argument(help="Text of the prompt. For a run, the text that fills its template.")
    ] = None,
    row: Annotated[
        int | None,
        typer.Option(min=0, help="Row of the run's data to use instead of a prompt, for runs with an environment."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter. Default: the newest checkpoint of the run.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Use the base model without an adapter.")] = False,
    no_template: Annotated[bool, typer.Option("--no-template", help="Do not use the run's template.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of tokens. Default: the run's limit; for a model, 512.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature. 0: greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=0, help="Sample from the K most likely tokens. 0: from all.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample from the most likely tokens that together reach this probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Sample tokens at least this fraction as likely as the likeliest token."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.01, help="Make tokens that already occurred less likely. 1: off.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop at this text, instead of the run's stop texts. May be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling, for temperatures above 0.")] = 0,
) -> None:
    """Answer a prompt, and show the text while it is sampled.

    A run answers as in training: with its template, system message, stop texts and maximum length, and above
    temperature 0 with its sampling settings. A run with tools or an environment holds a conversation with them, and
    grpo shows it turn by turn, tool calls included.
    """
    from grpo.tools.generate import find_answering

    settings = {
        "temperature": temperature,
        "max_tokens": max_tokens,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": tuple(stop) if stop else None,
    }
    asked = _asked(settings)
    _print_answer(find_answering(target, adapter, base, not no_template), prompt, row, asked, seed)


def _asked(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the given settings. Raises UserError for settings without effect."""
    from grpo.errors import UserError

    top_p, filters = settings["top_p"], settings["top_k"] or settings["min_p"]
    if settings["temperature"] == 0 and (filters or (top_p is not None and top_p < 1)):
        raise UserError("--top-k, --top-p and --min-p have no effect at temperature 0 (greedy): add --temperature 1")
    if "" in (settings["stop"] or ()):
        raise UserError("--stop: an empty text would end the answer at its first token")
    return {name: value for name, value in settings.items() if value is not None}


def _print_answer(found: Answering, prompt: str | None, row: int | None, asked: dict[str, Any], seed: int) -> None:
    """Print an answer while it is sampled, or a conversation turn by turn."""
    from grpo.errors import UserError
    from grpo.tools.converse import converse
    from grpo.tools.generate import answer

    if found.conversations:
        converse(found, prompt, row, asked, seed, lambda line: print(line, flush=True))
        return
    if row is not None:
        raise UserError("--row requires a run with an environment or tools: give a prompt instead")
    if prompt is None:
        raise UserError("a prompt is missing: write it after the run or model, in quotes")
    for text in answer(found, prompt, asked, seed):
        print(text, end="", flush=True)
    print()
