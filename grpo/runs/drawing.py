"""What chooses a run's tasks: a stream of its rows, a curriculum over the rows, or the user's own class."""

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
    """The source of a run's tasks, over the streams of its rows by name; its draws derive from `seed`. A source in
    `given` replaces `data.sampler`.

    Raises UserError for a sampler that cannot be loaded or is not a source, and for a reward of `data.curriculum` that
    the run does not have or that does not score the tasks.
    """
    if given.source is not None:
        if data.sources:
            raise UserError(
                "data.sources does nothing with source=..., which gets the stream of a single source: remove one of "
                "the two, or name a class for each source in its sampler setting"
            )
        if data.curriculum is not None:
            raise UserError("data.curriculum does nothing with source=..., which chooses all tasks: remove one of them")
        stream = streams["data"]
        if isinstance(stream, WindowStream):
            raise UserError(
                "data.streaming does not work with source=..., which may ask for any row: remove one of them"
            )
        return given.source(stream)
    parts = {
        name: _of_one(part, name, streams[name], scorer, seed_of(data, name, seed)) for name, part in data.parts.items()
    }
    if not data.sources:
        return parts["data"]
    return Mixture(parts, {one.called: one.ratio for one in data.sources}, seed)


def seed_of(data: DataConfig, source: str, seed: int) -> int:
    """The seed of a source: the run's seed, or a seed derived per source if there are several, so that two sources of
    equal size are not shuffled alike."""
    return seed if len(data.sources) < 2 else derive_seed(seed, f"source:{source}")


def check_begins(source: Source) -> None:
    """Raise UserError if a curriculum has no task to begin with.

    Called before the first evaluation, which takes minutes, and in a dry run.
    """
    for one in source.sources.values() if isinstance(source, Mixture) else [source]:
        if isinstance(one, Curriculum):
            one.check()


def _of_one(data: DataConfig, name: str, stream: TaskStream | WindowStream, scorer: Scorer, seed: int) -> Source:
    """The source of tasks from the rows of one stream."""
    if isinstance(stream, WindowStream):  # samplers and curricula need to know all rows
        return stream
    if data.sampler is not None:
        return _own(data.sampler, stream)
    if data.curriculum is None:
        return stream
    solved = solved_by(scorer, data.curriculum, name)
    return Curriculum(stream, data.curriculum, solved, seed, known_rates(data, stream.rows))


def solved_by(scorer: Scorer, cfg: CurriculumConfig | None = None, source: str = "data") -> Solved:
    """How solve rates of a source's tasks are computed in a run with these rewards.

    Raises UserError for a reward that the run does not have, or that does not score these tasks.
    """
    cfg = cfg or CurriculumConfig()
    if cfg.reward is None:
        graders = scorer.graders(source)
        return Solved(tuple(graders), not set(graders) & set(scorer.rewards), cfg.best)
    if cfg.reward not in scorer.weights:
        raise UserError(
            f"data.curriculum.reward: the run has no reward {cfg.reward!r}; its rewards are {', '.join(scorer.weights)}"
        )
    if cfg.reward in scorer.rewards and not scorer.applies(cfg.reward, source):
        raise UserError(
            f"data.curriculum.reward: {cfg.reward!r} does not score tasks of the source {source!r} (it is not in the "
            "source's rewards): give that source its own curriculum"
        )
    return Solved((cfg.reward,), cfg.reward in scorer.environments, cfg.best)


def chosen_note(data: DataConfig, rows: int, name: str = "data") -> list[str]:
    """Notes on a source whose rows are rated or chosen by solve rate; empty for a source of plain rows."""
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
    """The SHA-256 of each file of solve rates that decides which rows a run trains on, by source and setting.

    Files of sources without `solve_rate`, which keep all rows, are left out: a resumed run gets its rates from the
    checkpoint. Missing files are left out too: loading the rows of a resumed run raises the error.
    """
    parts = {name: part for name, part in data.parts.items() if part.solve_rates and part.solve_rate is not None}
    files = {name: Path(str(part.solve_rates)).expanduser() for name, part in parts.items()}
    return {f"{name}.solve_rates": hash_of(file) for name, file in files.items() if file.is_file()}


def gone_rates(data: DataConfig, state: RunState) -> list[str]:
    """The names of the sources whose file of `solve_rates` is missing and not needed, because the run's state has the
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
    except Exception as error:  # the user's code may raise anything: show it
        raise UserError(f"data.{what}: calling it with the stream of tasks failed: {one_line(error)}") from error
    if made is None:
        raise UserError(f"data.{what}: it returned None; it must be the class of a source, or return a source of tasks")
    own = OwnSource(checked_source(made), f"data.{what}")
    own.state()  # raises now, not at the first checkpoint, if the state cannot be saved
    return own
