"""One entry of `data.sources`: some of a run's tasks, and how often they are drawn."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from grpo.config.curriculum import CurriculumConfig
from grpo.config.section import Above0, Fraction, Name, Positive, Section, Tokens

if TYPE_CHECKING:
    from grpo.config.data import DataConfig

TAKEN = ("data", "eval")
"""Names that no source may have: tasks of a single source use `data`, held-out tasks use `eval`."""


def _fits(name: str) -> bool:
    """Whether a source's name can be part of metric names."""
    return name not in TAKEN and bool(name.strip()) and name.isprintable() and not set("/\\") & set(name)


def _source_name(name: str) -> str:
    if not _fits(name):
        raise PydanticCustomError(
            "not_a_source_name",
            "expected a name in one line, without slashes, other than {taken}",
            {"taken": " and ".join(TAKEN)},
        )
    return name


class SourceConfig(Section):
    name: Annotated[str, AfterValidator(_source_name)] | None = None
    """Name of the source in metrics, such as `sources/<name>/reward`. Default: the last part of `source` or `use`,
    without the file extension."""
    ratio: Above0 = 1.0
    """How often this source's tasks are drawn, compared with other sources: each task is drawn from this source with
    probability ratio / sum of all ratios."""
    rewards: tuple[str, ...] | None = None
    """Names of the recipe's `rewards` that score this source's completions. The other rewards are not called for them
    and give no score. Default: all rewards."""
    environment: Name | None = None
    """The environment among the recipe's `environments` that this source's tasks use, instead of the environment that
    the column `environment` names. Default: `data.environment`."""
    source: Name | Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Where this source's rows come from, in any form that `data.source` takes."""
    use: str | None = None
    """Instead of `source`: a function that returns this source's rows, in the forms of `data.use`."""
    kwargs: dict[str, Any] = {}
    """Arguments for the function in `use`."""
    config: str | None = None
    """Configuration of a Hub dataset. Default: the only configuration, or `main` if there are several."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    split: str | None = None
    """Split to train on. Default: `data.split`."""
    shuffle: bool | None = None
    """Whether this source's rows come in a new order each epoch. Default: `data.shuffle`."""
    streaming: bool | None = None
    """Read this source's rows when they are needed. Default: `data.streaming`."""
    window: Positive | None = None
    """With `streaming`, the number of this source's rows in memory. Default: `data.window`."""
    columns: dict[str, str] | None = None
    """New names for this source's columns, instead of `data.columns`. Default: `data.columns`."""
    prompt: str | None = None
    """A column or a template for this source's prompts. Default: `data.prompt`."""
    continue_final_message: bool | None = None
    """Whether this source's chat prompts may end with an assistant message. Default: `data.continue_final_message`."""
    system: str | None = None
    """A system message for this source's prompts. Default: `data.system`. If sources have different system messages,
    rewards see text prompts with a system message as messages."""
    chat_template: Literal["auto", "always", "never"] | None = None
    """Whether this source's text prompts go through the chat template. Default: `data.chat_template`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Arguments for the chat template, instead of `data.chat_template_kwargs`. Default: `data.chat_template_kwargs`."""
    max_prompt_length: Tokens | None = None
    """Maximum prompt length in tokens. Longer prompts are dropped and counted. Default: `data.max_prompt_length`."""
    solve_rates: Name | None = None
    """A file that `grpo eval --solve-rates` wrote for this source's rows."""
    solve_rate: tuple[Fraction, Fraction] | None = None
    """Keep only the tasks whose rate in `solve_rates` is between these two values, both included."""
    curriculum: CurriculumConfig | None = None
    """Draw this source's tasks by how often they were solved. Default: `data.curriculum`."""
    sampler: str | None = None
    """Your own class that chooses this source's tasks, in the forms of `data.sampler`. Default: none."""

    @property
    def called(self) -> str:
        """The source's name: `name`, or the last part of `source` or `use` without the file extension."""
        if self.name is not None:
            return self.name
        origin = self.source[0] if isinstance(self.source, tuple) else self.source or self.use or ""
        file, _, function = origin.partition(":")
        parts = [part for part in (function or file).split("/") if part and not set("*?[") & set(part)]
        return re.sub(r"\.(jsonl?|csv|parquet|py)$", "", parts[-1]) if parts else origin

    @property
    def settings(self) -> dict[str, Any]:
        """The source's settings that are also settings of `data`."""
        given = {name: getattr(self, name) for name in self.changed - OF_A_SOURCE}
        return {name: value for name, value in given.items() if value is not None}

    def among(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """The source's complete settings of `data`: its own settings, then the `shared` settings of all sources. A
        shared `window` is dropped if the source does not stream and shuffle."""
        given = {**shared, **self.settings}
        if not (given.get("streaming") and given.get("shuffle", True)) and "window" not in self.settings:
            given.pop("window", None)
        return given


OF_A_SOURCE = frozenset({"name", "ratio", "rewards"})
"""Settings of a source that `data` does not have."""
OF_ONE = frozenset({"source", "use", "kwargs", "config", "revision", "solve_rates", "solve_rate", "sampler"})
"""Settings that belong to a single source: where its rows come from, and which rows are used."""


def check_sources(cfg: DataConfig) -> None:
    """Raise ValueError if the settings of several sources contradict each other or the section `data`."""
    if beside := sorted(cfg.changed & OF_ONE):
        raise ValueError(
            f"data.{beside[0]} does nothing with data.sources, where each source has its own: leave out one of them"
        )
    for place, source in enumerate(cfg.sources):
        if source.called in (called := [one.called for one in cfg.sources[:place]]):
            raise ValueError(
                f"data.sources.{place} has the same name as data.sources.{called.index(source.called)}, "
                f"{source.called!r}, but metrics need unique names: give one of them another name (name: ...)"
            )
        if not _fits(source.called):
            raise ValueError(
                f"data.sources.{place} would get the name {source.called!r}, which metrics cannot use: give it another "
                "name (name: ...)"
            )
        try:
            cfg.part(source)
        except ValidationError as error:
            raise ValueError(_of_source(error.errors()[0]["msg"], place, cfg.changed - source.changed)) from None
    if "window" in cfg.changed and not any("window" in part.changed for part in cfg.parts.values()):
        raise ValueError("data.window does nothing: it is for sources with streaming and shuffle, and none has both")


def _of_source(said: str, place: int, shared: Collection[str]) -> str:
    """The error `said` with the full names of a source's settings; `shared` settings are in the section `data`."""

    def setting(found: re.Match[str]) -> str:
        return found[0] if found[1] in shared else f"data.sources.{place}.{found[1]}"

    said = re.sub(r"\bdata\.(\w+)", setting, said.removeprefix("Value error, "))
    return said if f"data.sources.{place}" in said else f"{said} (data.sources.{place})"
