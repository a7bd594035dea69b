"""`grpo rewards`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from grpo.cli.commands import CommandGroup
from grpo.errors import RunError, UserError
from grpo.plugins import locate_reward, named_rewards

app = typer.Typer(cls=CommandGroup, help="Reward functions: those at hand, and your own.", no_args_is_help=True)

Kwargs = Annotated[
    list[str] | None, typer.Option("--kwarg", metavar="NAME=VALUE", help="An argument; may be repeated.")
]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME", help="A variable with a secret that the reward may see; may be repeated."),
]
Timeout = Annotated[float, typer.Option(min=0.01, help="Seconds that one call may take.")]


@app.command("list")
def list_() -> None:
    """Name each reward, what it grades, the columns it reads and its arguments."""
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
        typer.Option("--column", metavar="NAME=VALUE", help="A column of the dataset, for cases that have none."),
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option("--cases", metavar="FILE", help="Cases: a .json, .jsonl or .py file. Default: the reward's own."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Give completions and prompts as chat messages, as TRL does for chats.")
    ] = False,
    no_fuzz: Annotated[bool, typer.Option("--no-fuzz", help="Run the cases alone: a judge costs money.")] = False,
    env: Env = None,
    timeout: Timeout = 10.0,
) -> None:
    """Grade its CASES, then completions that are empty, huge, foreign or hostile, and say how long it takes.

    Cases keep the arguments that they were written for; --kwarg is what the rest is graded with. Where a file has
    several rewards, CASES = {"function": [...]} says which cases are whose.
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
        raise RunError(f"reward {reward!r}: it failed on several completions in one call")


@app.command("score")
def score(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    reward: Annotated[str, typer.Option("--reward", help="A name, file.py, file.py:function, pkg.mod:fn, model:NAME.")],
    kwarg: Kwargs = None,
    env: Env = None,
    against: Annotated[str | None, typer.Option(help="The stored reward to compare with. Default: see above.")] = None,
    timeout: Timeout = 30.0,
    examples: Annotated[int, typer.Option(min=0, help="Completions to show, those that change most.")] = 3,
) -> None:
    """Apply a new or changed reward to a run's stored completions, and show what would have changed.

    It is compared with the run's reward of the same name, or else with the sum of all its rewards.
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
def new(name: Annotated[str, typer.Argument(help="Its name; it is written to NAME.py here.")]) -> None:
    """Write a reward function to start from, with cases that it passes."""
    from grpo.scoring.template import TEMPLATE

    path = Path(name if name.endswith(".py") else f"{name}.py")
    if not path.stem.isidentifier():
        raise UserError(f"{path.stem!r} is no name for a Python file: letters, digits and _")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise UserError(f"{path} exists already") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    print(
        f"{path}\ntest it:  grpo rewards test {path}\nuse it:   rewards: [{{use: {path.name}}}]  in a recipe beside it"
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
