"""What chooses a run's tasks: the stream of its rows, a curriculum over them, or a class of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo.backend.hub import one_line
from grpo.config import CurriculumConfig, DataConfig
from grpo.data.curriculum import Curriculum
from grpo.data.rates import known_rates
from grpo.data.solved import Solved
from grpo.data.source import Source, checked_source
from grpo.data.stream import TaskStream
from grpo.errors import UserError
from grpo.plugins import find_function
from grpo.runs.checkpoint import hash_of
from grpo.runs.given import Given
from grpo.runs.state import RunState
from grpo.scoring.scorer import Scorer


def source_of(data: DataConfig, given: Given, stream: TaskStream, scorer: Scorer, seed: int) -> Source:
    """The source of a run's tasks, which draws from the seed. What is `given` takes the place of `data.sampler`.

    Raises UserError for a sampler that cannot be had, or is no source, and for a reward of `data.curriculum` that the
    run has not.
    """
    if given.source is not None:
        if data.curriculum is not None:
            raise UserError("data.curriculum does nothing beside source=..., which chooses all tasks: leave out one")
        return given.source(stream)
    if data.sampler is not None:
        return _own(data.sampler, stream)
    if data.curriculum is None:
        return stream
    return Curriculum(stream, data.curriculum, solved_by(scorer, data.curriculum), seed, known_rates(data, stream.rows))


def solved_by(scorer: Scorer, cfg: CurriculumConfig | None = None) -> Solved:
    """What a solve rate is in a run with these rewards. Raises UserError for a reward that it has not."""
    cfg = cfg or CurriculumConfig()
    if cfg.reward is None:
        return Solved(tuple(scorer.graders), not scorer.rewards, cfg.best)
    if cfg.reward not in scorer.weights:
        raise UserError(
            f"data.curriculum.reward: the run has no reward {cfg.reward!r}; there is {', '.join(scorer.weights)}"
        )
    return Solved((cfg.reward,), cfg.reward in scorer.environments, cfg.best)


def chosen_note(data: DataConfig, rows: int) -> list[str]:
    """What there is to say of tasks that are not simply all rows."""
    if data.solve_rate is None:
        return []
    low, high = data.solve_rate
    return [f"data.solve_rate: {rows:,} tasks have a solve rate from {low:g} to {high:g} and are trained on"]


def rates_hash(data: DataConfig) -> dict[str, str]:
    """A SHA-256 of the file of solve rates that says which rows a run trains on, by the setting's name.

    Where `data.solve_rate` keeps all rows there is none: a run that goes on has the rates of its checkpoint. Nor is
    there where the file has gone: a run that goes on needs it, and that will say so.
    """
    file = data.solve_rates and Path(data.solve_rates).expanduser()
    return {"data.solve_rates": hash_of(file)} if file and data.solve_rate is not None and file.is_file() else {}


def rates_have_gone(data: DataConfig, state: RunState) -> bool:
    """Whether the file of `data.solve_rates` is not there and not needed, because a run's state has the rates."""
    needed = data.solve_rate is not None or "solve_rates" not in state.trainer.counts["tasks"]
    return data.solve_rates is not None and not needed and not Path(data.solve_rates).expanduser().exists()


def _own(use: str, stream: TaskStream) -> Source:
    what = f"sampler {use!r}"
    make = find_function(use, "sampler", classes=True)
    try:
        made: Any = make(stream)
    except UserError:
        raise
    except Exception as error:  # the user's code: whatever it raises is theirs to see
        raise UserError(f"data.{what}: it cannot be made with the stream of tasks: {one_line(error)}") from error
    if made is None:
        raise UserError(f"data.{what}: it returned None; it has to return a source of tasks, or be the class of one")
    return checked_source(made)
