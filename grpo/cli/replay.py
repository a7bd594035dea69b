"""`grpo replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def replay(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    step: Annotated[int, typer.Option(min=1, help="The step to repeat.")],
    groups: Annotated[int, typer.Option(min=1, help="Number of the step's prompts to show.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Number of tokens to show with ratios, for each completion.")] = 12,
) -> None:
    """Repeat a step from the nearest checkpoint, and show what happened in it.

    Shows prompts, completions, rewards and advantages, and for each token the ratio of its probability after the
    step's update to its probability before the update.
    """
    from rich.console import Console

    from grpo.telemetry.replayed import print_replay
    from grpo.tools.replay import replay as again

    console = Console()
    with console.status("replaying"):
        made = again(run, step)
    print_replay(console, made, groups, tokens)
