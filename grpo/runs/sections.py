"""The sections of a recipe that rows come from: each source of tasks, and the held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo.config import DataConfig, Recipe
from grpo.errors import UserError
from grpo.recipes import with_settings
from grpo.scoring.applying import Applying

WINDOW = DataConfig.model_fields["window"].default
NOT_CHOSEN: Mapping[str, Any] = {"solve_rates": None, "solve_rate": None, "curriculum": None, "sampler": None}
"""The settings that choose rows for training, with the values that keep all rows."""


def data_of(cfg: Recipe) -> dict[str, DataConfig]:
    """The sections that rows come from: `data`, or each of `data.sources`, by name; and `eval` if there is one."""
    return {**cfg.data.parts, **({} if cfg.eval is None else {"eval": _held_out(cfg)})}


def read_as(cfg: Recipe) -> str | None:
    """The name of the source whose prompt format and rewards the held-out rows share; None: those of the whole `data`
    section, because no source has the same rows."""
    assert cfg.eval is not None
    own, parts = cfg.eval, cfg.data.parts
    if own.source is None and own.use is None:
        return next(iter(parts))
    same = [name for name, data in parts.items() if (data.source, data.use) == (own.source, own.use)]
    configured = [name for name in same if own.config is not None and parts[name].config == own.config]
    return next(iter([*configured, *same]), None if cfg.data.sources else "data")


def text_system(cfg: Recipe) -> str | None:
    """The system message before text prompts. None if sections differ in it: then prompts with a system message become
    messages, also for rewards and environments."""
    systems = {data.system for data in data_of(cfg).values()}
    return systems.pop() if len(systems) == 1 else None


def without_choice(cfg: Recipe) -> Recipe:
    """The recipe with all rows, instead of those that are chosen for training."""
    sources = [with_settings(source, NOT_CHOSEN) for source in cfg.data.sources]
    return with_settings(cfg, {"data": with_settings(cfg.data, {**NOT_CHOSEN, "sources": sources})})


def with_rates(cfg: Recipe, files: Mapping[str, str | None]) -> Recipe:
    """The recipe with these files of solve rates, by name of the source."""
    if not cfg.data.sources:
        return with_settings(cfg, {"data.solve_rates": files["data"]}) if files else cfg
    sources = [
        with_settings(one, {"solve_rates": files[one.called]}) if one.called in files else one
        for one in cfg.data.sources
    ]
    return with_settings(cfg, {"data.sources": tuple(sources)})


def _held_out(cfg: Recipe) -> DataConfig:
    assert cfg.eval is not None
    name, own = read_as(cfg), cfg.eval
    data = cfg.data if name is None else cfg.data.parts[name]
    settings: dict[str, Any] = {"split": own.split, "sources": (), **NOT_CHOSEN}
    if own.source is not None or own.use is not None:
        settings |= {"source": own.source, "use": own.use, "kwargs": own.kwargs}
        if own.source != data.source:
            settings |= {"config": None, "revision": None, "streaming": False, "window": WINDOW}
    settings |= {name: getattr(own, name) for name in own.changed & {"config", "revision"}}
    return with_settings(data, settings)


def only_of(cfg: Recipe) -> dict[str, Sequence[str]]:
    """The names of the rewards that score the tasks of a source, for each source with a `rewards` setting."""
    return {one.called: one.rewards for one in cfg.data.sources if one.rewards is not None}


def applying_of(cfg: Recipe, names: Sequence[str]) -> Applying:
    """Which of the rewards with these `names` score the tasks of which source.

    Held-out tasks have the rewards of the source that they are read as (`read_as`). Raises UserError for a name that no
    reward has, and for a reward that scores no source.
    """
    only = only_of(cfg)
    like = None if cfg.eval is None else read_as(cfg)
    applying = Applying({**only, **({"eval": only[like]} if like in only else {})})
    applying.check(names)
    sections = data_of(cfg)
    for name in names:
        if not any(applying(name, section) for section in sections):
            raise UserError(
                f"reward {name!r} does nothing: each of data.sources names its rewards, and none names this one. Add "
                "it to a source, or remove it"
            )
    return applying
