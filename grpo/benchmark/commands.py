"""`grpo bench`: a command for each benchmark. What most of them can be told is written down once, in `OPTIONS`."""

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

app = typer.Typer(help="Measure this machine: sides take turns in one process, and ratios count.", no_args_is_help=True)


def _writable(path: Path | None) -> Path | None:
    """Before minutes of measuring, not after them."""
    if path is None:
        return None
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{path} cannot be written: there is no such folder, or it is one itself")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written: permission denied")
    return path


OPTIONS: dict[str, Any] = {
    "shape": Annotated[
        str, typer.Option(help="Random weights: qwen3-tiny, -1m, -25m, -0.6b, -1.7b, -4b, -8b or -moe-2m.")
    ],
    "model": Annotated[str | None, typer.Option(help="A real model instead: a Hub repository, folder or built-in.")],
    "lora": Annotated[
        bool, typer.Option(help="Sample with a LoRA of rank 16 on every linear layer; what trains has one.")
    ],
    "prompts": Annotated[int, typer.Option(min=1)],
    "completions": Annotated[int, typer.Option(min=1, help="Of each prompt.")],
    "prompt_length": Annotated[int, typer.Option(min=1, help="In tokens.")],
    "completion_length": Annotated[int, typer.Option(min=1, help="In tokens.")],
    "lengths": Annotated[
        str,
        typer.Option(
            help="How completions' lengths vary, up to --completion-length: fixed, exponential:MEAN, log-normal:MEAN."
        ),
    ],
    "slots": Annotated[int | None, typer.Option(min=1, help="Rows decoded at once. Default: all of them.")],
    "peer_slots": Annotated[
        int | None, typer.Option(min=1, help="Rows that mlx-lm decodes at once. Default: as many as slots.")
    ],
    "peer_prompts_once": Annotated[
        bool,
        typer.Option(
            "--peer-prompts-once",
            help="Give mlx-lm the cache of each prompt, computed once and copied for its completions, which "
            "`batch_generate` does not do by itself.",
        ),
    ],
    "bits": Annotated[
        int | None, typer.Option(min=2, max=8, help="Of a shape's quantized matrices. Default: not quantized.")
    ],
    "limit": Annotated[
        float | None,
        typer.Option(max=1e6, help="Plan for so many GB of memory (memory.limit_gb). Default: this machine's."),
    ],
    "runs": Annotated[int, typer.Option(min=1, help="Runs of each side, after one warm-up.")],
}
"""A `Setting`'s fields, as a command takes them that gives them a default."""
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
        help="Bounds (scripts/benchmarks/bounds.toml): exit with 1, naming what fell short, if one does not hold.",
    ),
]


def command(**defaults: Any) -> Callable[[Measure], Measure]:
    """Make a measuring function of a `Setting` a command that has these of its fields, and its own other options."""
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
        vars(run)["__signature__"] = inspect.Signature([*shared, *own, *end])  # where typer looks
        app.command(measure.__name__, help=measure.__doc__)(run)
        return measure

    return register


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@command(**LOAD, **VARIED, lora=True)
def rollout(
    setting: "Setting",
    wheel_blas: Annotated[
        bool, typer.Option("--wheel-blas", help="Leave mlx-lm the BLAS of MLX's wheel: it runs in its own process.")
    ] = False,
    alone: Annotated[bool, typer.Option("--alone", help="Leave mlx-lm out.")] = False,
) -> Measurements:
    """The generator against mlx-lm's `BatchGenerator`, or its `stream_generate` for one row: tok/s and peak memory."""
    from grpo.benchmark.peer import against_wheel
    from grpo.benchmark.rollout import against_mlx_lm, by_itself
    from grpo.errors import UserError

    if alone and (wheel_blas or setting.peer_slots or setting.peer_prompts_once):
        raise UserError("--alone: options of mlx-lm's side mean nothing without it")
    if alone:
        return by_itself(setting)
    return (against_wheel if wheel_blas else against_mlx_lm)(setting)


@command(prompts=2, completions=8, prompt_length=64, completion_length=64, bits=None, limit=None)
def train(
    setting: "Setting",
    update: Annotated[bool, typer.Option("--update", help="The update alone, in its variants.")] = False,
    variants: Annotated[
        str, typer.Option(help="With --update: these alone, separated by semicolons (plain; shared; shared, kept; …).")
    ] = "",
    minutes: Annotated[float, typer.Option(help="With --update: warm up no further variant after this time.")] = 7.0,
    peer_python: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Python of an environment with another toolkit: measure it too."
        ),
    ] = None,
    peer: Annotated[
        str | None, typer.Option(help="With --peer-python: which toolkit, unsloth or (the default) mlx-lm-lora.")
    ] = None,
    peer_options: Annotated[
        str, typer.Option(help="With --peer-python: options of its script in scripts/benchmarks, in one string.")
    ] = "",
    blas: Annotated[
        bool, typer.Option("--blas", help="With --peer-python: give the peer the BLAS that grpo loads (MKL).")
    ] = False,
) -> Measurements:
    """A whole GRPO step (rollout, reward, logprobs, update) beside another toolkit's, or the update in its variants.

    With --update the shared way's gradient is first held against the plain way's.
    """
    from grpo.benchmark.peers import Toolkit
    from grpo.benchmark.train import compare_steps
    from grpo.benchmark.updates import compare_updates, variant_names
    from grpo.errors import UserError

    if update and (peer_python or blas):
        raise UserError("--peer-python and --blas are for whole steps: leave --update out")
    if (variants and not update) or ((peer or blas or peer_options) and not peer_python):
        raise UserError(
            "--variants means nothing without --update, nor --peer, --blas and --peer-options without --peer-python"
        )
    if setting.limit is not None and update:
        raise UserError("--limit means nothing with --update, which plans nothing")
    if setting.limit is not None and setting.limit <= 0:
        raise UserError(f"--limit: expected a number above 0, got {setting.limit:g}")
    if setting.bits == 7:
        raise UserError("--bits: MLX quantizes to 2, 3, 4, 5, 6 or 8 bits, not to 7")
    if setting.bits is not None and (setting.model or peer_python):
        raise UserError("--bits is for a shape's random weights, and not beside another toolkit's")
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
            help="Drafts that are accepted at every step, of random weights: a side for each number. Default: 1,2,3,4."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME", help="Instead: the steps of this recipe (a file, or a bundled one), over epochs."
        ),
    ] = None,
    pool: Annotated[
        int | None, typer.Option(min=1, help="With --recipe: its first prompts, which make an epoch. Default: 16.")
    ] = None,
    ways: Annotated[
        str | None,
        typer.Option(
            help="With --recipe: values of rollout.speculate to hold against off, as in auto,3. Default: auto."
        ),
    ] = None,
) -> Measurements:
    """What speculation adds: by the drafts that are accepted, or over a recipe's epochs. Tokens are compared."""
    from grpo.benchmark.epochs import epochs_of, ways_of
    from grpo.benchmark.speculation import counts, speculation_gains
    from grpo.errors import UserError
    from grpo.plugins import find_recipe

    if recipe is None:
        if pool is not None or ways is not None:
            raise UserError("--pool and --ways mean nothing without --recipe")
        return speculation_gains(setting, counts("1,2,3,4" if accepted is None else accepted))
    if accepted is not None:
        raise UserError("--accepted means nothing with --recipe: there drafts are accepted as they are right")
    usual: dict[str, Any] = {**COMMON, **LOAD, "runs": setting.runs}
    if setting != type(setting)(**usual):
        raise UserError("--recipe says which model, prompts and lengths: of the options for these, only --runs counts")
    return epochs_of(find_recipe(recipe), pool or 16, ways_of("auto" if ways is None else ways), setting.runs)


@command(prompts=4, completions=8, prompt_length=128, completion_length=128, runs=2)
def overlap(
    setting: "Setting",
    seconds: Annotated[float, typer.Option(min=0, help="Seconds that the reward takes for a group.")] = 1.0,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Rows decoded at once. Default: one group's, one group after the other.")
    ] = None,
) -> Measurements:
    """A step with a slow reward: its groups scored while others decode, and after all of them."""
    from grpo.benchmark.overlap import overlap_costs

    return overlap_costs(setting, seconds, slots)


@command(prompts=8, completions=8, prompt_length=128, completion_length=16, lora=True, runs=1)
def waiting(
    setting: "Setting",
    seconds: Annotated[float, typer.Option(min=0, help="The longest that an answer takes.")] = 1.0,
    power: Annotated[float, typer.Option(min=0, help="Of a uniform number: above 1 most answers are quick.")] = 1.0,
    turns: Annotated[int, typer.Option(min=1, help="Of the model, each followed by an answer.")] = 4,
) -> Measurements:
    """Conversations whose environments take their time, with and without a barrier after each turn: seconds."""
    from grpo.benchmark.waiting import Sleeps, waiting_costs

    return waiting_costs(setting, turns, Sleeps(seconds, power))


@command(prompt_length=128, completion_length=128, runs=3)
def serve(
    setting: "Setting",
    clients: Annotated[str, typer.Option(help="How many ask at once: a case for each number.")] = "1,8,64",
    alone: Annotated[bool, typer.Option("--alone", help="Leave mlx-lm's server out.")] = False,
) -> Measurements:
    """What clients get from `grpo serve`, whole and streamed, beside the generator alone and mlx_lm.server: tok/s."""
    from grpo.benchmark.serving import numbers_of, serving_costs

    return serving_costs(setting, numbers_of(clients), peer=not alone)


@command(**LOAD, lora=True)
def sampling(setting: "Setting") -> Measurements:
    """What each sampling filter costs: tok/s of the generator, held against sampling at temperature 1."""
    from grpo.benchmark.sampling import sampling_costs

    return sampling_costs(setting)


@command(**LOAD, lora=True)
def logprobs(setting: "Setting") -> Measurements:
    """What it costs that a completion has its logprobs: tok/s with and without."""
    from grpo.benchmark.sampling import logprob_costs

    return logprob_costs(setting)


@command(**LOAD, lora=True)
def head(
    setting: "Setting",
    dtype: Annotated[
        str, typer.Option(help="Of a model with random weights: auto (bfloat16 on a GPU), bfloat16 or float16.")
    ] = "auto",
) -> Measurements:
    """What float32 logits of a 16-bit model (model.head_dtype) cost: tok/s, an update's seconds, peak memory."""
    from grpo.benchmark.heads import head_costs
    from grpo.errors import UserError

    if dtype not in ("auto", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: auto, bfloat16 or float16")
    return head_costs(setting, dtype)


@command(prompts=8, completions=8, prompt_length=128, lora=True)
def length(setting: "Setting") -> Measurements:
    """Whether a decoding step takes as long in a long completion as in a short one: ms by length."""
    from grpo.benchmark.lengths import length_costs

    return length_costs(setting)


@command(lora=True, runs=20)
def context(setting: "Setting") -> Measurements:
    """Whether a forward pass or a decoding step suddenly costs more at some length: ms by length, and the growth."""
    from grpo.benchmark.lengths import context_costs

    return context_costs(setting)


@command(**LOAD)
def ops(setting: "Setting") -> Measurements:
    """SwiGLU, norm, attention, products and experts at the model's shapes: ms to build the graph, and to run it."""
    from grpo.benchmark.ops import operation_costs

    return operation_costs(setting)


@command(**LOAD, lora=True)
def breakdown(setting: "Setting") -> Measurements:
    """Where the time goes: shares of a decoding step, and of a GRPO step with its checkpoint and its logging."""
    from grpo.benchmark.breakdown import breakdown

    return breakdown(setting)


@command(prompt_length=16, lora=True, runs=10)
def streaming(setting: "Setting") -> Measurements:
    """What it costs to see tokens as they come: streamed, under asyncio, and with callbacks that do something."""
    from grpo.benchmark.streaming import streaming_costs

    return streaming_costs(setting)


@command(prompt_length=16, runs=20)
def adapter(setting: "Setting") -> Measurements:
    """Loading, switching and merging an adapter, and whether the first token after a switch is slower: ms."""
    from grpo.benchmark.adapters import adapter_costs

    return adapter_costs(setting)


@command(**LOAD, lora=False)
def quantized(setting: "Setting") -> Measurements:
    """Weights as stored, quantised at load, and stored quantised: tok/s, GB, and ms to load."""
    from grpo.benchmark.quantized import quantized_costs

    return quantized_costs(setting)


@command(**LOAD, lora=True)
def roofline(setting: "Setting") -> Measurements:
    """How near a rollout and an update come to the copy bandwidth and matmul rate that this machine has just shown."""
    from grpo.benchmark.roofline import roofline

    return roofline(setting)


@command(prompts=2, completions=8, prompt_length=64, completion_length=64, lora=True)
def scale(setting: "Setting") -> Measurements:
    """Rollouts and steps of 1, 2, 4, 8 times the prompts, and what a row costs; under mlx.launch over processes."""
    from grpo.benchmark.scale import scaling

    return scaling(setting)
