"""`grpo bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure this machine: sides take turns in one process, and ratios count.", no_args_is_help=True)

Shape = Annotated[str, typer.Option(help="The model's shape, with random weights: qwen3-1m, qwen3-25m, qwen3-0.6b.")]
Runs = Annotated[int, typer.Option(min=1, help="Runs of each side, after one warm-up.")]


def _writable(path: Path | None) -> Path | None:
    """Before minutes of measuring, not after them."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(f"{path} cannot be written: there is no such folder, or it is one itself")
    return path


Json = Annotated[
    Path | None,
    typer.Option("--json", callback=_writable, help="Write machine, versions and rows to this file."),
]

Prompts = Annotated[int, typer.Option(min=1)]
Completions = Annotated[int, typer.Option(min=1, help="Of each prompt.")]
Length = Annotated[int, typer.Option(min=1, help="In tokens.")]
Lora = Annotated[bool, typer.Option(help="LoRA of rank 16 on every linear layer.")]


@app.command()
def rollout(
    shape: Shape = "qwen3-1m",
    prompts: Prompts = 8,
    completions: Completions = 8,
    prompt_length: Length = 128,
    completion_length: Length = 128,
    lora: Lora = True,
    wheel_blas: Annotated[
        bool, typer.Option("--wheel-blas", help="Leave mlx-lm the BLAS of MLX's wheel: it runs in its own process.")
    ] = False,
    runs: Runs = 5,
    json: Json = None,
) -> None:
    """The generator against mlx-lm's `BatchGenerator`, or its `stream_generate` for one row: tok/s and peak memory."""
    from grpo.benchmark.peer import against_wheel
    from grpo.benchmark.protocol import finish
    from grpo.benchmark.rollout import Load, against_mlx_lm

    load = Load(prompts, completions, prompt_length, completion_length)
    finish((against_wheel if wheel_blas else against_mlx_lm)(shape, load, lora, runs), json)


@app.command()
def sampling(
    shape: Shape = "qwen3-1m",
    prompts: Prompts = 8,
    completions: Completions = 8,
    prompt_length: Length = 128,
    completion_length: Length = 128,
    lora: Lora = True,
    runs: Runs = 5,
    json: Json = None,
) -> None:
    """What logprobs and each sampling filter cost: tok/s of the generator, held against plain sampling."""
    from grpo.benchmark.decoding import sampling_costs
    from grpo.benchmark.protocol import finish
    from grpo.benchmark.rollout import Load

    finish(sampling_costs(shape, Load(prompts, completions, prompt_length, completion_length), lora, runs), json)


@app.command()
def length(
    shape: Shape = "qwen3-1m",
    prompts: Prompts = 8,
    completions: Completions = 8,
    prompt_length: Length = 128,
    lora: Lora = True,
    runs: Runs = 5,
    json: Json = None,
) -> None:
    """Whether a decoding step takes as long in a long completion as in a short one: ms by length."""
    from grpo.benchmark.decoding import length_costs
    from grpo.benchmark.protocol import finish
    from grpo.benchmark.rollout import Load

    finish(length_costs(shape, Load(prompts, completions, prompt_length, 1), lora, runs), json)


@app.command()
def context(shape: Shape = "qwen3-1m", lora: Lora = True, runs: Runs = 20, json: Json = None) -> None:
    """Whether a forward pass has a length at which it suddenly costs more: ms by length, and the steps over 15 %."""
    from grpo.benchmark.decoding import cliffs, context_costs
    from grpo.benchmark.protocol import finish

    rows = list(context_costs(shape, lora, runs))
    finish(rows, json)
    print("\n".join(cliffs(rows)) or "no step")


@app.command()
def adapter(
    shape: Shape = "qwen3-1m",
    prompt_length: Annotated[int, typer.Option(min=1, help="In tokens.")] = 16,
    runs: Runs = 20,
    json: Json = None,
) -> None:
    """Switching to another state of the adapter, and whether the first token after it is slower than any other: ms."""
    from grpo.benchmark.adapters import switch_costs
    from grpo.benchmark.protocol import finish

    finish(switch_costs(shape, prompt_length, runs), json)


@app.command()
def train(
    shape: Shape = "qwen3-1m",
    prompts: Annotated[int, typer.Option(min=1)] = 2,
    completions: Annotated[int, typer.Option(min=2, help="Of each prompt.")] = 8,
    prompt_length: Annotated[int, typer.Option(min=1, help="In tokens.")] = 64,
    completion_length: Annotated[int, typer.Option(min=1, help="In tokens.")] = 64,
    update: Annotated[bool, typer.Option("--update", help="The update alone, in its variants.")] = False,
    variants: Annotated[str, typer.Option(help="Of --update, by name, separated by semicolons.")] = "",
    minutes: Annotated[float, typer.Option(help="Begin no further variant of --update after so long.")] = 7.0,
    peer_python: Annotated[
        Path | None, typer.Option(help="The Python of an environment with mlx-lm-lora: measure it too.")
    ] = None,
    blas: Annotated[bool, typer.Option("--blas", help="Give the peer the BLAS that grpo loads (MKL).")] = False,
    runs: Runs = 5,
    json: Json = None,
) -> None:
    """A whole GRPO step (rollout, reward, logprobs, update) beside mlx-lm-lora's, or the update in its variants.

    With --update the shared way's gradient is first held against the plain way's.
    """
    from grpo.benchmark.protocol import finish
    from grpo.benchmark.rollout import Load
    from grpo.benchmark.train import compare_steps, compare_updates, parity, variant_names

    load = Load(prompts, completions, prompt_length, completion_length)
    if not update:
        finish(compare_steps(shape, load, runs, peer_python, blas), json)
        return
    names = variant_names(variants)
    print(parity(shape, Load(2, 4, min(prompt_length, 128), min(completion_length, 128))), flush=True)
    finish(compare_updates(shape, load, runs, names, 60 * minutes), json)
