"""Puts rewards, data, and losses that are Python objects into a recipe, which holds their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpo.config import EvalConfig, Recipe
from grpo.config.data import is_files
from grpo.data.objects import has_splits, rows_from
from grpo.door.checks import kind_of
from grpo.door.environments import partner_sections
from grpo.door.rewards import Rewardable, as_rewards
from grpo.door.tasks import OBJECT, is_source, source_of
from grpo.errors import UserError
from grpo.plugins import Function
from grpo.recipes import with_settings
from grpo.runs.given import Given, MakeSource, name_of

SAID_BY = "grpo.Trainer"


def handed(
    cfg: Recipe,
    rewards: Sequence[Rewardable] | None,
    data: Any,
    eval_data: Any,
    loss: Callable[..., Any] | None,
    source: MakeSource | None,
    environment: Any = None,
    environments: Mapping[str, Any] | None = None,
    tools: Sequence[Any] | None = None,
) -> tuple[Recipe, Given]:
    """Return the recipe with names for the given objects, and the objects. None keeps the recipe's value.

    Raises UserError if the arguments do not fit together, or do not fit the recipe.
    """
    settings: dict[str, Any] = {}
    functions: dict[str, Function] = {}
    tables: dict[str, Any] = {}
    if rewards is not None:
        settings["rewards"] = tuple(_named(as_rewards(rewards), functions))
    if loss is not None and not callable(loss):
        raise UserError(
            f"{SAID_BY}: loss: expected a function (current, batch, cfg), got {kind_of(loss)}; choose a published loss "
            'in the recipe: grpo.recipe(..., loss={"type": "dapo"})'
        )
    if source is not None and not callable(source):
        raise UserError(
            f"{SAID_BY}: source: expected a function or a class that creates a source from the stream of the recipe's "
            f"data, got {kind_of(source)}; to pass an existing object: source=lambda stream: mine"
        )
    if loss is not None:
        use = name_of(loss, functions)
        functions[use] = loss
        settings["loss.use"] = use
    settings |= partner_sections(environment, environments, tools, functions, SAID_BY)
    if data is not None:
        settings |= _placed("data", data, tables)
    if eval_data is not None:
        if cfg.eval is None:
            cfg = with_settings(cfg, {"eval": _section_for(eval_data)}, SAID_BY)
        settings |= _placed("eval", eval_data, tables)
    elif data is not None and cfg.eval is not None and cfg.eval.source is None and cfg.eval.use is None:
        if "data" in tables and not has_splits(data):
            raise UserError(
                f"{SAID_BY}: the recipe evaluates on the split {cfg.eval.split!r} of its data, but the given data has "
                "no splits: pass eval_data=... as well, or use grpo.recipe(..., eval=None)"
            )
        if "data" in tables:
            tables["eval"] = data
    return with_settings(cfg, settings, SAID_BY), Given(functions, tables, source)


def _section_for(eval_data: Any) -> EvalConfig:
    """Return the section `eval` for a recipe without this section. Files have one split, `train`."""
    files = is_source(eval_data) and is_files(source_of(eval_data))
    return EvalConfig(split="train") if files else EvalConfig()


def _named(rewards: Sequence[Any], functions: dict[str, Function]) -> list[Any]:
    """Return the recipe's entries for rewards, and add their functions to `functions` under the entries' names."""
    lines = []
    for given in rewards:
        config = given.config
        if given.function is not None:
            use = name_of(given.function, functions)
            functions[use] = given.function
            config = with_settings(config, {"use": use}, SAID_BY)
        lines.append(config)
    return lines


def _placed(section: str, data: Any, tables: dict[str, Any]) -> dict[str, Any]:
    """Return the settings for the place of a section's rows. An object is added to `tables` as the section's table."""
    place: dict[str, Any] = {"source": None, "use": None, "kwargs": {}, "config": None, "revision": None}
    if is_source(data):
        place["source"] = source_of(data)
    else:
        place["use"] = OBJECT
        tables[section] = data
        if not has_splits(data):  # read it now, because an iterator can be read only once
            tables[section] = rows_from(data, f"{section}: the object given for it", "train")
            place["split"] = "train"
    if section == "data":
        place["sources"] = ()
    return {f"{section}.{name}": value for name, value in place.items()}
