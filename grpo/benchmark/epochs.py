"""`grpo bench speculate --recipe`: the steps of a recipe over epochs, with and without speculation, in turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from grpo.backend.device import on_gpu
from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.config.rollout import Speculate
from grpo.data.stream import TaskStream
from grpo.errors import RunError, UserError
from grpo.recipes import load_recipe
from grpo.runs.given import Given
from grpo.runs.prepare import prepare
from grpo.training.trainer import Trainer
from grpo.types import Group, Task

TOLD = ("accepted", "width")
"""The metrics `speculation/…` of a step that are reported, if speculation was on. The gain is measured here."""
_Tokens = list[tuple[int, ...]]


class Pool:
    """A source that repeats the first `size` tasks of a stream in order: a dataset with short epochs."""

    def __init__(self, stream: TaskStream, size: int) -> None:
        self._tasks, self._cursor = stream.take(size), 0

    def take(self, n: int) -> list[Task]:
        places = range(self._cursor, self._cursor + n)
        self._cursor += n
        return [self._tasks[place % len(self._tasks)] for place in places]

    def observe(self, groups: Sequence[Group]) -> None:
        """Do nothing: the order is fixed."""

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, int]:
        return {"cursor": self._cursor}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._cursor = state["cursor"]


@dataclass
class _Training:
    """A run of the recipe, step by step. `tokens` has the tokens that each step sampled."""

    trainer: Trainer
    tokens: list[_Tokens] = field(default_factory=list)

    def step(self) -> Values:
        start = time.perf_counter()
        metrics = self.trainer.step(len(self.tokens) + 1)
        values = {"s": time.perf_counter() - start, "s rollout": metrics.values["time/rollout"]}
        self.tokens.append([r.trajectory.token_ids for group in metrics.groups for r in group.rollouts])
        told = {name: metrics.values.get(f"speculation/{name}", 0.0) for name in TOLD}
        return {**values, "tokens": sum(map(len, self.tokens[-1])), **told}


def ways_of(text: str) -> list[str]:
    """Values of `rollout.speculate`, separated by commas. Raises UserError for other values, and for `off`, which is
    always measured."""
    known = [str(value) for value in get_args(get_args(Speculate)[0]) if value != "off"]
    found = [way.strip() for way in text.split(",")]
    if not set(found) <= set(known):
        raise UserError(f"--ways {text}: expected some of {', '.join(known)}, separated by commas")
    return found


def epochs_of(recipe: Path, pool: int, speculate: Sequence[str], runs: int) -> Iterator[Measurement]:
    """Steps of a recipe over its first `pool` prompts, without speculation and with each `speculate`, in turns.

    The first epoch, whose prompts have no earlier answers, and later epochs have separate rows. The first step is a
    warm-up. Raises UserError if `runs` does not reach a second epoch, and on a CPU RunError if tokens differ.
    """
    with ExitStack() as opened:
        trainings = {name: _training(recipe, pool, name, runs + 1, opened) for name in ("off", *speculate)}
        rows = trainings["off"].trainer.cfg.rollout.prompts_per_step
        first = -(-pool // rows)  # steps of an epoch
        if pool < rows:
            raise UserError(
                f"--pool {pool}: a step of this recipe takes {rows} prompts, so an epoch needs at least {rows}"
            )
        if runs < first:
            epoch = f"an epoch is {first} steps of {rows} prompts"
            raise UserError(f"--pool {pool}, --runs {runs}: {epoch}, and the second one begins with --runs {first}")
        sides = [Side(name, training.step) for name, training in trainings.items()]
        measured = alternate(f"steps of {recipe.stem}, {pool} prompts", sides, runs)
        yield from _parted(measured, first - 1)
        yield from _same(trainings, measured[0].case)


def _training(recipe: Path, pool: int, speculate: str, steps: int, opened: ExitStack) -> _Training:
    cfg = load_recipe(recipe, [f"rollout.speculate={speculate}", f"optim.steps={steps}"])
    prepared = prepare(cfg, Given(source=lambda stream: Pool(stream, pool)))
    opened.enter_context(prepared.opened)
    return _Training(prepared.trainer)


def _parted(rows: Sequence[Measurement], first: int) -> Iterator[Measurement]:
    """The measurements, split into the first `first` turns and the other turns."""
    for name, part in (("first epoch", slice(None, first)), ("later epochs", slice(first, None))):
        for row in rows:
            if row.runs[part]:
                yield replace(row, case=f"{row.case}: {name}", runs=row.runs[part], ratios=row.ratios[part])


def _same(trainings: Mapping[str, _Training], case: str) -> Iterator[Measurement]:
    """For each step, the fraction of rows with the same tokens as in the run without speculation."""
    plain = trainings["off"].tokens
    for name, training in trainings.items():
        shares = [_share(mine, theirs) for mine, theirs in zip(training.tokens, plain, strict=True)]
        if min(shares) < 1 and not on_gpu():
            raise RunError(
                f"speculate {name}: {100 * (1 - fmean(shares)):.1f} % of the rows have other tokens than without "
                "speculation"
            )
        yield Measurement(case, name, "same rows", tuple(shares[1:]), shares[0])


def _share(mine: _Tokens, theirs: _Tokens) -> float:
    return fmean(a == b for a, b in zip(mine, theirs, strict=True))
