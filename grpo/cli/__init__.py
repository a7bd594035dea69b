"""The `grpo` command. Each command has one file, which only calls other rooms."""

from __future__ import annotations

import sys

import typer

from grpo import __version__
from grpo.backend.device import out_of_memory
from grpo.backend.hub import one_line
from grpo.backend.ranks import Ranks
from grpo.backend.secrets import mask_logs, masked, masked_traceback
from grpo.backend.watch import Lost
from grpo.benchmark import commands as benchmarks
from grpo.cli import doctor, evaluate, export, generate, recipes, replay, report, rewards, runs, serve, train, watch
from grpo.cli.commands import CommandGroup, TakesSettings
from grpo.errors import LostRankError, RunError, UserError

app = typer.Typer(
    help="GRPO fine-tuning on one machine with MLX.",
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train", cls=TakesSettings)(train.train)
app.command("eval", cls=TakesSettings)(evaluate.evaluate)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("watch")(watch.watch)
app.command("runs")(runs.runs)
app.command("replay")(replay.replay)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.add_typer(recipes.app, name="recipes")
app.add_typer(rewards.app, name="rewards")
app.add_typer(benchmarks.app, name="bench", cls=CommandGroup)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Show the version and exit.")) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command. A user's mistake is one message and exit code 2; a failed run is exit code 1.

    Neither messages nor tracebacks of our own errors show secrets from environment variables.
    """
    mask_logs()
    try:
        _run()
    except Exception as error:
        if (said := masked_traceback(error)) is None:
            raise
        print(said, end="", file=sys.stderr)
        sys.exit(1)


def _reported_to_ranks() -> None:
    """Run the command. If it fails, tell the run's other processes, if there are any, that this process has failed."""
    try:
        app(prog_name="grpo")
    except BaseException as error:
        ended = isinstance(error, SystemExit) and error.code in (None, 0)
        if Ranks.watching is not None:
            Ranks.watching.failed = not ended
        raise


def _run() -> None:
    try:
        _reported_to_ranks()
    except (LostRankError, Lost) as error:
        if getattr(error, "speaks", False):
            print(f"grpo: {masked(str(error))}", file=sys.stderr)
        sys.exit(1)
    except UserError as error:
        print(f"grpo: {masked(str(error))}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"grpo: {masked(str(error))}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        print(
            f"grpo: out of memory ({one_line(error)}). Other programs on the device also use its memory. To need less, "
            "lower optim.micro_batch_tokens (the update) or rollout.max_concurrency (the rollout), or set "
            "optim.gradient_checkpointing=true or model.quantize=4. The last checkpoint of a run is intact: "
            "resume from it with `grpo train --resume`",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("grpo: stopped immediately", file=sys.stderr)
        sys.exit(130)
