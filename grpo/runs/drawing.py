"""What chooses a run's tasks: the stream of its rows, a curriculum over them, or a class of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.backend.hub import one_line
from grpo.backend.random import derive_seed
from grpo.config import CurriculumConfig, DataConfig
from grpo.data.curriculum import Curriculum
from grpo.data.mixture import Mixture
from grpo.data.own import OwnSource
from grpo.data.rates import SolveRates, known_rates
from grpo.data.solved import Solved
from grpo.data.source import Source, checked_source
from grpo.data.stream import TaskStream
from grpo.data.streaming import WindowStream
from grpo.errors import UserError
from grpo.plugins import find_function
from grpo.runs.checkpoint import hash_of
from grpo.runs.given import Given
from grpo.runs.state import RunState
from grpo.scoring.scorer import Scorer


def source_of(
    data: DataConfig, given: Given, streams: Mapping[str, TaskStream | WindowStream], scorer: Scorer, seed: int
) -> Source:
    """The source of a run's tasks, which draws from the seed, over the streams of its rows by name. What is `given`
    takes the place of `data.sampler`.

    Raises UserError for a sampler that cannot be had, or is no source, and for a reward of `data.curriculum` that the
    run has not, or that does not score those tasks.
    """
    if given.source is not None:
        if data.sources:
            raise UserError(
                "data.sources does nothing beside source=..., which is made of the stream of one source: leave out one "
                "of them, or name a class for each source by its sampler"
            )
        if data.curriculum is not None:
            raise UserError("data.curriculum does nothing beside source=..., which chooses all tasks: leave out one")
        stream = streams["data"]
        if isinstance(stream, WindowStream):
            raise UserError("data.streaming does nothing beside source=..., which may ask for any row: leave out one")
        return given.source(stream)
    parts = {
        name: _of_one(part, name, streams[name], scorer, seed_of(data, name, seed)) for name, part in data.parts.items()
    }
    if not data.sources:
        return parts["data"]
    return Mixture(parts, {one.called: one.ratio for one in data.sources}, seed)


def seed_of(data: DataConfig, source: str, seed: int) -> int:
    """What a source draws from: the run's seed, or one of its own among several sources, so that two of as many rows
    are not shuffled alike."""
    return seed if len(data.parts) == 1 else derive_seed(seed, f"source:{source}")


def check_begins(source: Source) -> None:
    """Raise UserError where a curriculum has no task to begin with: before an evaluation, which takes minutes, and in a
    run that only rehearses."""
    for one in source.sources.values() if isinstance(source, Mixture) else [source]:
        if isinstance(one, Curriculum):
            one.check()


def _of_one(data: DataConfig, name: str, stream: TaskStream | WindowStream, scorer: Scorer, seed: int) -> Source:
    """The source of tasks from the rows of one stream."""
    if isinstance(stream, WindowStream):  # nothing chooses among rows that are not known
        return stream
    if data.sampler is not None:
        return _own(data.sampler, stream)
    if data.curriculum is None:
        return stream
    solved = solved_by(scorer, data.curriculum, name)
    return Curriculum(stream, data.curriculum, solved, seed, known_rates(data, stream.rows))


def solved_by(scorer: Scorer, cfg: CurriculumConfig | None = None, source: str = "data") -> Solved:
    """What a solve rate of a source's tasks is in a run with these rewards. Raises UserError for a reward that the run
    has not, or that does not score these tasks."""
    cfg = cfg or CurriculumConfig()
    if cfg.reward is None:
        graders = scorer.graders(source)
        return Solved(tuple(graders), not set(graders) & set(scorer.rewards), cfg.best)
    if cfg.reward not in scorer.weights:
        raise UserError(
            f"data.curriculum.reward: the run has no reward {cfg.reward!r}; there is {', '.join(scorer.weights)}"
        )
    if cfg.reward in scorer.rewards and not scorer.applies(cfg.reward, source):
        raise UserError(
            f"data.curriculum.reward: {cfg.reward!r} does not score tasks of the source {source!r} (its rewards do not "
            "name it): give that source a curriculum of its own"
        )
    return Solved((cfg.reward,), cfg.reward in scorer.environments, cfg.best)


def chosen_note(data: DataConfig, rows: int, name: str = "data") -> list[str]:
    """What there is to say of tasks of a source that are not simply all rows."""
    if data.solve_rates is None or not Path(data.solve_rates).expanduser().exists():
        return []
    known = SolveRates.read(Path(data.solve_rates))
    rated = f"{known.known:,} of {len(known.rates):,} tasks have a rate in {data.solve_rates}{known.by}"
    if data.solve_rate is None:
        return [f"{name}.solve_rates: {rated}"]
    low, high = data.solve_rate
    chosen = f"{rows:,} tasks have a solve rate from {low:g} to {high:g} and are trained on"
    return [f"{name}.solve_rate: {chosen}; {rated}"]


def rates_hash(data: DataConfig) -> dict[str, str]:
    """A SHA-256 of each file of solve rates that says which rows a run trains on, by the source's name and the
    setting's.

    Where `data.solve_rate` keeps all rows there is none: a run that goes on has the rates of its checkpoint. Nor is
    there where the file has gone: a run that goes on needs it, and that will say so.
    """
    parts = {name: part for name, part in data.parts.items() if part.solve_rates and part.solve_rate is not None}
    files = {name: Path(str(part.solve_rates)).expanduser() for name, part in parts.items()}
    return {f"{name}.solve_rates": hash_of(file) for name, file in files.items() if file.is_file()}


def gone_rates(data: DataConfig, state: RunState) -> list[str]:
    """The names of the sources whose file of `solve_rates` is not there and not needed, because a run's state has the
    rates."""
    tasks = state.trainer.counts["tasks"]
    states = tasks.get("sources", {}) if data.sources else {"data": tasks}
    files = {name: part.solve_rates for name, part in data.parts.items() if part.solve_rate is None}
    known = {name: file for name, file in files.items() if file and "solve_rates" in states.get(name, {})}
    return [name for name, file in known.items() if not Path(file).expanduser().exists()]


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
    own = OwnSource(checked_source(made), f"data.{what}")
    own.state()  # one that no checkpoint can hold is said before the first step
    return own
