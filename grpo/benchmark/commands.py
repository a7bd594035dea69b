"""`grpo bench`: one command per benchmark. `OPTIONS` defines the options that most of them share."""

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from grpo.benchmark.protocol import Measurement
    from grpo.benchmark.setting import Setting

Measurements = Iterable["Measurement"]
Measure = Callable[..., Measurements]

app = typer.Typer(
    help="Benchmark this machine. The compared sides take turns in one process, and the result is their ratio.",
    no_args_is_help=True,
)


def _writable(path: Path | None) -> Path | None:
    """The path, if it can be written. Checked before the measurements, which take minutes."""
    if path is None:
        return None
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path} cannot be written: it is a folder, or its folder does not exist")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written: permission denied")
    return path


OPTIONS: dict[str, Any] = {
    "shape": Annotated[
        str,
        typer.Option(
            help="Model shape with random weights: qwen3-tiny, qwen3-1m, -25m, -0.6b, -1.7b, -4b, -8b or -moe-2m."
        ),
    ],
    "model": Annotated[str | None, typer.Option(help="A real model instead: a Hub repository, folder or built-in.")],
    "lora": Annotated[bool, typer.Option(help="Sample with LoRA, rank 16, on all linear layers. Training has it.")],
    "prompts": Annotated[int, typer.Option(min=1, help="Number of prompts.")],
    "completions": Annotated[int, typer.Option(min=1, help="Number of completions per prompt.")],
    "prompt_length": Annotated[int, typer.Option(min=1, help="Length of each prompt in tokens.")],
    "completion_length": Annotated[int, typer.Option(min=1, help="(Maximum) length of each completion in tokens.")],
    "lengths": Annotated[
        str,
        typer.Option(
            help="Distribution of completion lengths, up to --completion-length: fixed, exponential:MEAN or "
            "log-normal:MEAN."
        ),
    ],
    "slots": Annotated[
        int | None, typer.Option(min=1, help="Number of rows that decode simultaneously. Default: all rows.")
    ],
    "peer_slots": Annotated[
        int | None,
        typer.Option(min=1, help="Rows that mlx-lm decodes simultaneously. Default: the same as --slots."),
    ],
    "peer_prompts_once": Annotated[
        bool,
        typer.Option(
            "--peer-prompts-once",
            help="Compute each prompt's cache once for mlx-lm, and copy it for the prompt's completions. "
            "`batch_generate` does not do this itself.",
        ),
    ],
    "bits": Annotated[
        int | None,
        typer.Option(min=2, max=8, help="Quantize the random weights to this many bits. Default: not quantized."),
    ],
    "limit": Annotated[
        float | None,
        typer.Option(max=1e6, help="GB of memory to plan for (memory.limit_gb). Default: this machine's memory."),
    ],
    "runs": Annotated[int, typer.Option(min=1, help="Number of runs per side, after one warm-up run.")],
}
"""The options for fields of `Setting`. A command has the options for which it gives a default."""
COMMON = {"shape": "qwen3-1m", "model": None, "runs": 5}
LOAD = {"prompts": 8, "completions": 8, "prompt_length": 128, "completion_length": 128}
VARIED = {"lengths": "fixed", "slots": None, "peer_slots": None, "peer_prompts_once": False}

JsonOption = Annotated[
    Path | None, typer.Option("--json", callback=_writable, help="Write machine, versions and rows to this file.")
]
CheckOption = Annotated[
    Path | None,
    typer.Option(
        "--check",
        metavar="FILE",
        help="Compare the rows with the bounds in this file (scripts/benchmarks/bounds.toml). If a row falls short, "
        "name it and exit with 1.",
    ),
]


def command(**defaults: Any) -> Callable[[Measure], Measure]:
    """A decorator that makes a command of a function that measures a `Setting`. The command has options for the fields
    of `Setting` in `defaults`, and for the function's other parameters."""
    defaults = {**COMMON, **defaults}

    def register(measure: Measure) -> Measure:
        def run(json: Path | None, check: Path | None, **given: Any) -> None:
            from grpo.benchmark.report import report
            from grpo.benchmark.setting import Setting

            setting = Setting(**{name: given.pop(name) for name in defaults})
            report(measure.__name__, setting, lambda: measure(setting, **given), json, check)

        own = [p.replace(kind=p.KEYWORD_ONLY) for p in list(inspect.signature(measure).parameters.values())[1:]]
        shared = [_parameter(name, OPTIONS[name], default) for name, default in defaults.items()]
        end = [_parameter("json", JsonOption, None), _parameter("check", CheckOption, None)]
        vars(run)["__signature__"] = inspect.Signature([*shared, *own, *end])  # typer reads it
        app.command(measure.__name__, help=measure.__doc__)(run)
        return measure

    return register


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@command(**LOAD, **VARIED, lora=True)
def rollout(
    setting: "Setting",
    wheel_blas: Annotated[
        bool, typer.Option("--wheel-blas", help="Run mlx-lm with the BLAS of MLX's wheel, in its own process.")
    ] = False,
    alone: Annotated[bool, typer.Option("--alone", help="Do not measure mlx-lm.")] = False,
) -> Measurements:
    """Compare the generator with mlx-lm's `BatchGenerator` (`stream_generate` for one row): tok/s and peak memory."""
    from grpo.benchmark.peer import against_wheel
    from grpo.benchmark.rollout import against_mlx_lm, by_itself
    from grpo.errors import UserError

    if alone and (wheel_blas or setting.peer_slots or setting.peer_prompts_once):
        raise UserError("--alone: mlx-lm is not measured, so its options have no effect: remove them")
    if alone:
        return by_itself(setting)
    return (against_wheel if wheel_blas else against_mlx_lm)(setting)


@command(prompts=2, completions=8, prompt_length=64, completion_length=64, bits=None, limit=None)
def train(
    setting: "Setting",
    update: Annotated[bool, typer.Option("--update", help="Measure only the update, in several variants.")] = False,
    variants: Annotated[
        str,
        typer.Option(
            help="With --update: only these variants, separated by semicolons (plain; shared; shared, kept; …)."
        ),
    ] = "",
    minutes: Annotated[
        float, typer.Option(help="With --update: skip variants that are not warmed up after this many minutes.")
    ] = 7.0,
    peer_python: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Measure another toolkit, too: the Python of its environment."),
    ] = None,
    peer: Annotated[
        str | None, typer.Option(help="With --peer-python: the toolkit, mlx-lm-lora (the default) or unsloth.")
    ] = None,
    peer_options: Annotated[
        str,
        typer.Option(help="With --peer-python: options of the toolkit's script in scripts/benchmarks, as one string."),
    ] = "",
    blas: Annotated[
        bool, typer.Option("--blas", help="With --peer-python: let the toolkit use the BLAS that grpo loads (MKL).")
    ] = False,
) -> Measurements:
    """Measure a GRPO step (rollout, reward, logprobs, update), also of another toolkit, or variants of the update.

    With --update, the gradient with shared prompts is first compared with the plain gradient.
    """
    from grpo.benchmark.peers import Toolkit
    from grpo.benchmark.train import compare_steps
    from grpo.benchmark.updates import compare_updates, variant_names
    from grpo.errors import UserError

    if update and (peer_python or blas):
        raise UserError("--peer-python and --blas are for whole steps: remove --update")
    if variants and not update:
        raise UserError("--variants has no effect without --update")
    if (peer or blas or peer_options) and not peer_python:
        raise UserError("--peer, --blas and --peer-options have no effect without --peer-python")
    if setting.limit is not None and update:
        raise UserError("--limit has no effect with --update, which makes no plan: remove it")
    if setting.limit is not None and setting.limit <= 0:
        raise UserError(f"--limit: expected a number above 0, got {setting.limit:g}")
    if setting.bits == 7:
        raise UserError("--bits: MLX quantizes to 2, 3, 4, 5, 6 or 8 bits, not to 7")
    if setting.bits is not None and (setting.model or peer_python):
        raise UserError("--bits is only for random weights (--shape), without another toolkit: remove it")
    if update:
        return compare_updates(setting, variant_names(variants), 60 * minutes)
    toolkit = Toolkit(peer or "mlx-lm-lora", peer_python, blas, peer_options) if peer_python else None
    return compare_steps(setting, toolkit)


@command(**LOAD, lora=True)
def speculate(
    setting: "Setting",
    accepted: Annotated[
        str | None,
        typer.Option(
            help="With random weights: numbers of drafts accepted at every step, one side per number. Default: 1,2,3,4."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME", help="Measure the steps of this recipe (a file or a bundled recipe) over epochs."
        ),
    ] = None,
    pool: Annotated[
        int | None,
        typer.Option(min=1, help="With --recipe: number of its first prompts that form an epoch. Default: 16."),
    ] = None,
    ways: Annotated[
        str | None,
        typer.Option(
            help="With --recipe: values of rollout.speculate to compare with off, such as auto,3. Default: auto."
        ),
    ] = None,
) -> Measurements:
    """Measure the gain of speculation, by number of accepted drafts or over a recipe's epochs, and check the tokens."""
    from grpo.benchmark.epochs import epochs_of, ways_of
    from grpo.benchmark.speculation import counts, speculation_gains
    from grpo.errors import UserError
    from grpo.plugins import find_recipe

    if recipe is None:
        if pool is not None or ways is not None:
            raise UserError("--pool and --ways have no effect without --recipe")
        return speculation_gains(setting, counts("1,2,3,4" if accepted is None else accepted))
    if accepted is not None:
        raise UserError("--accepted has no effect with --recipe, where the model decides which drafts are accepted")
    usual: dict[str, Any] = {**COMMON, **LOAD, "runs": setting.runs}
    if setting != type(setting)(**usual):
        raise UserError("--recipe sets the model, the prompts and the lengths: remove the options for these")
    return epochs_of(find_recipe(recipe), pool or 16, ways_of("auto" if ways is None else ways), setting.runs)


@command(prompts=4, completions=8, prompt_length=128, completion_length=128, runs=2)
def overlap(
    setting: "Setting",
    seconds: Annotated[float, typer.Option(min=0, help="Seconds that the reward takes per group.")] = 1.0,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of rows that decode simultaneously. Default: the rows of one group, group after group."
        ),
    ] = None,
) -> Measurements:
    """Measure a step with a slow reward: groups scored while other groups decode, and scored after decoding."""
    from grpo.benchmark.overlap import overlap_costs

    return overlap_costs(setting, seconds, slots)


@command(prompts=8, completions=8, prompt_length=128, completion_length=16, lora=True, runs=1)
def waiting(
    setting: "Setting",
    seconds: Annotated[float, typer.Option(min=0, help="Maximum seconds of an environment's answer.")] = 1.0,
    power: Annotated[
        float,
        typer.Option(min=0, help="An answer takes SECONDS × u ** POWER, u uniform: above 1, most answers are fast."),
    ] = 1.0,
    turns: Annotated[int, typer.Option(min=1, help="Number of the model's turns, each followed by an answer.")] = 4,
) -> Measurements:
    """Measure conversations with slow environments, with and without a barrier after each turn: seconds."""
    from grpo.benchmark.waiting import Sleeps, waiting_costs

    return waiting_costs(setting, turns, Sleeps(seconds, power))


@command(prompt_length=128, completion_length=128, runs=3)
def serve(
    setting: "Setting",
    clients: Annotated[str, typer.Option(help="Numbers of simultaneous clients, one case per number.")] = "1,8,64",
    alone: Annotated[bool, typer.Option("--alone", help="Do not measure mlx-lm's server.")] = False,
) -> Measurements:
    """Measure `grpo serve` (whole and streamed), the generator without a server, and mlx_lm.server: tok/s."""
    from grpo.benchmark.serving import numbers_of, serving_costs

    return serving_costs(setting, numbers_of(clients), peer=not alone)


@command(**LOAD, lora=True)
def sampling(setting: "Setting") -> Measurements:
    """Measure the cost of each sampling filter: tok/s, compared with sampling at temperature 1."""
    from grpo.benchmark.sampling import sampling_costs

    return sampling_costs(setting)


@command(**LOAD, lora=True)
def logprobs(setting: "Setting") -> Measurements:
    """Measure the cost of a completion's logprobs: tok/s with and without them."""
    from grpo.benchmark.sampling import logprob_costs

    return logprob_costs(setting)


@command(**LOAD, lora=True)
def head(
    setting: "Setting",
    dtype: Annotated[
        str, typer.Option(help="Data type of random weights: auto (bfloat16 on a GPU), bfloat16 or float16.")
    ] = "auto",
) -> Measurements:
    """Measure the cost of a 16-bit model's float32 logits (model.head_dtype): tok/s, seconds of an update, memory."""
    from grpo.benchmark.heads import head_costs
    from grpo.errors import UserError

    if dtype not in ("auto", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: expected auto, bfloat16 or float16")
    return head_costs(setting, dtype)


@command(prompts=8, completions=8, prompt_length=128, lora=True)
def length(setting: "Setting") -> Measurements:
    """Measure whether decoding steps are slower in longer completions: ms per step by length."""
    from grpo.benchmark.lengths import length_costs

    return length_costs(setting)


@command(lora=True, runs=20)
def context(setting: "Setting") -> Measurements:
    """Find lengths at which a forward pass or a decoding step suddenly costs more: ms by length, and the growth."""
    from grpo.benchmark.lengths import context_costs

    return context_costs(setting)


@command(**LOAD)
def ops(setting: "Setting") -> Measurements:
    """Measure SwiGLU, norm, attention, matmuls and experts at the model's shapes: ms to build and to run the graph."""
    from grpo.benchmark.ops import operation_costs

    return operation_costs(setting)


@command(**LOAD, lora=True)
def breakdown(setting: "Setting") -> Measurements:
    """Show where the time goes: shares of a decoding step, and of a GRPO step with checkpoint and logging."""
    from grpo.benchmark.breakdown import breakdown

    return breakdown(setting)


@command(prompt_length=16, lora=True, runs=10)
def streaming(setting: "Setting") -> Measurements:
    """Measure the cost of streaming tokens: plain, under asyncio, and with callbacks that do work."""
    from grpo.benchmark.streaming import streaming_costs

    return streaming_costs(setting)


@command(prompt_length=16, runs=20)
def adapter(setting: "Setting") -> Measurements:
    """Measure loading, switching and merging an adapter, and the first token after a switch: ms."""
    from grpo.benchmark.adapters import adapter_costs

    return adapter_costs(setting)


@command(**LOAD, lora=False)
def quantized(setting: "Setting") -> Measurements:
    """Compare stored weights, weights quantized at load, and weights stored quantized: tok/s, GB, and ms to load."""
    from grpo.benchmark.quantized import quantized_costs

    return quantized_costs(setting)


@command(**LOAD, lora=True)
def roofline(setting: "Setting") -> Measurements:
    """Compare a rollout and an update with the machine's measured memory bandwidth and matmul rate."""
    from grpo.benchmark.roofline import roofline

    return roofline(setting)


@command(prompts=2, completions=8, prompt_length=64, completion_length=64, lora=True)
def scale(setting: "Setting") -> Measurements:
    """Measure rollouts and steps with 1, 2, 4 and 8 times the prompts, and the cost per row; also by mlx.launch."""
    from grpo.benchmark.scale import scaling

    return scaling(setting)
