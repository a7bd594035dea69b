"""`grpo rewards`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from grpo.cli.commands import CommandGroup
from grpo.errors import RunError, UserError
from grpo.plugins import locate_reward, named_rewards

app = typer.Typer(cls=CommandGroup, help="Reward functions: the bundled functions and your own.", no_args_is_help=True)

Kwargs = Annotated[
    list[str] | None, typer.Option("--kwarg", metavar="NAME=VALUE", help="An argument for the reward. May be repeated.")
]
Env = Annotated[
    list[str] | None,
    typer.Option(
        "--env", metavar="NAME", help="An environment variable with a secret that the reward may see. May be repeated."
    ),
]
Timeout = Annotated[float, typer.Option(min=0.01, help="Maximum number of seconds for one call.")]


@app.command("list")
def list_() -> None:
    """List the rewards, with what each grades, the columns that it reads and its arguments."""
    from grpo.scoring.describe import describe, describe_models

    for located in named_rewards():
        print("\n".join(describe(located)))
    print("\n".join(describe_models()))


@app.command("test")
def try_(
    reward: Annotated[
        str, typer.Argument(metavar="FILE_OR_NAME", help="A name, file.py, file.py:function, pkg.mod:fn, model:NAME.")
    ],
    kwarg: Kwargs = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="NAME=VALUE",
            help="A value for a dataset column, for cases that do not have the column.",
        ),
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option(
            "--cases", metavar="FILE", help="Cases: a .json, .jsonl or .py file. Default: the reward's own cases."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Pass completions and prompts as chat messages, as TRL does for chats.")
    ] = False,
    no_fuzz: Annotated[
        bool, typer.Option("--no-fuzz", help="Run only the cases, for example because calls of a judge cost money.")
    ] = False,
    env: Env = None,
    timeout: Timeout = 10.0,
) -> None:
    """Test a reward on its CASES, then on empty, huge, foreign and hostile completions, and print how long it takes.

    Each case keeps its own arguments; all other completions are graded with --kwarg. If a file has several rewards,
    CASES = {"function": [...]} assigns cases to each function.
    """
    from grpo.scoring.cases import Trial, try_out
    from grpo.scoring.describe import report_lines
    from grpo.scoring.process import WorkerTerms
    from grpo.scoring.text import counted

    terms = WorkerTerms(timeout, env=tuple(env or ()))
    trial = Trial(_values("--kwarg", kwarg), terms, _values("--column", column), chat, cases, fuzz=not no_fuzz)
    report = try_out(locate_reward(reward), trial)
    print("\n".join(report_lines(report)))
    if report.wrong:
        raise RunError(f"reward {reward!r}: {counted(len(report.wrong))} failed")
    if report.together is not None:
        raise RunError(f"reward {reward!r} failed when one call had several completions")


@app.command("score")
def score(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    reward: Annotated[str, typer.Option("--reward", help="A name, file.py, file.py:function, pkg.mod:fn, model:NAME.")],
    kwarg: Kwargs = None,
    env: Env = None,
    against: Annotated[
        str | None, typer.Option(help="The stored reward to compare with. Default: the same name, else all rewards.")
    ] = None,
    timeout: Timeout = 30.0,
    examples: Annotated[int, typer.Option(min=0, help="Number of completions to show: the largest changes.")] = 3,
) -> None:
    """Apply a new or changed reward to a run's stored completions, and show what would have changed.

    grpo compares it with the run's reward of the same name, or else with the sum of all rewards of the run.
    """
    from rich.console import Console

    from grpo.config import RewardConfig
    from grpo.recipes import with_settings
    from grpo.tools.rescore import rescore, rescore_table

    kwargs = _values("--kwarg", kwarg)
    terms = {"weight": 0.0, "kwargs": kwargs, "timeout": timeout, "env": tuple(env or ())}
    config = with_settings(RewardConfig(use=reward), terms, "grpo rewards score")
    result = rescore(run, config, against)
    console = Console()
    console.print(rescore_table(result))
    for line in result.lines(examples):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if all(completion.failure is not None for completion in result.completions):
        raise RunError(f"reward {reward!r} failed on every completion")


@app.command("new")
def new(name: Annotated[str, typer.Argument(help="Name of the reward. The file is NAME.py in this folder.")]) -> None:
    """Write a reward function to start from, with cases that it passes."""
    from grpo.scoring.template import TEMPLATE

    path = Path(name if name.endswith(".py") else f"{name}.py")
    if not path.stem.isidentifier():
        raise UserError(f"{path.stem!r} is not a valid name for a Python file: use letters, digits and _")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise UserError(f"{path} exists already: choose another name") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    print(
        f"{path}\ntest it:  grpo rewards test {path}\n"
        f"use it:   rewards: [{{use: {path.name}}}]  in a recipe in the same folder"
    )


def _values(option: str, given: list[str] | None) -> dict[str, Any]:
    from grpo.document import value_of

    values = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"{option} {text}: expected NAME=VALUE")
        try:
            values[name] = value_of(value)
        except ValueError as error:
            raise UserError(f"{option} {name}: {error}") from None
    return values
