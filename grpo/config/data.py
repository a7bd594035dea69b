"""The sections that say where rows come from, `data` and `eval`, and how such places are named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo.config.curriculum import CurriculumConfig
from grpo.config.section import Fraction, Name, Positive, Section, Tokens
from grpo.config.sources import SourceConfig, check_sources

FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Endings of data files, and the reader of `datasets` for each."""

Origin = str | tuple[str, ...]


def is_files(source: Origin) -> bool:
    """Whether a source names data files: one, several, or those that match a pattern."""
    return isinstance(source, tuple) or Path(source).suffix in FILE_TYPES or is_pattern(source)


def is_pattern(name: str) -> bool:
    """Whether a name is a pattern of file names: no dataset on the Hub has such characters in its name."""
    return any(character in name for character in "*?[")


def is_builtin(source: Origin) -> bool:
    """Whether a source is a built-in task."""
    return isinstance(source, str) and source.startswith("builtin:")


def origins(source: Origin | None, use: str | None) -> tuple[str, ...]:
    """All names by which a section says where rows come from."""
    named = source if isinstance(source, tuple) else (source, use)
    return tuple(name for name in named if name)


def data_label(source: Origin | None, use: str | None) -> str:
    """The name of rows in messages: the source or the function; of several files the first and how many more."""
    if isinstance(source, tuple):
        return source[0] if len(source) == 1 else f"{source[0]} and {len(source) - 1} more"
    return source or use or ""


def check_origin(section: str, source: Origin | None, use: str | None, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError where `source`, `use` and `kwargs` of a section do not go together."""
    if source is not None and use is not None:
        raise ValueError(
            f"{section}.use and {section}.source both say where rows come from: leave out one of them. On the command "
            f"line {section}.source=null leaves out the file's source, {section}.use=null its function"
        )
    if kwargs and use is None:
        raise ValueError(f"{section}.kwargs does nothing without {section}.use")
    for name in source if isinstance(source, tuple) else ():
        if not is_files(name):
            raise ValueError(f"{section}.source: a list holds files ({', '.join(FILE_TYPES)}); {name!r} is not a file")


def check_hub_only(setting: str, source: Origin | None, use: str | None) -> None:
    """Raise ValueError for a setting of Hub datasets beside rows that certainly do not come from the Hub."""
    if use is not None or (source is not None and (is_builtin(source) or is_files(source))):
        raise ValueError(f"{setting} is for Hub datasets; this source has none")


def check_choice(cfg: DataConfig) -> None:
    """Raise ValueError where the settings that choose tasks do not go together."""
    if cfg.curriculum is not None and cfg.sampler is not None:
        raise ValueError("data.curriculum does nothing beside data.sampler, which chooses all tasks: leave out one")
    if cfg.curriculum is not None and not cfg.shuffle:
        raise ValueError(
            "data.shuffle: false does nothing with data.curriculum, which draws each task by its solve rate: leave out "
            "one of them"
        )
    if cfg.solve_rate is not None and cfg.solve_rates is None:
        raise ValueError(
            "data.solve_rate needs data.solve_rates: a file with the solve rate of each task, from grpo eval "
            "--solve-rates FILE"
        )
    if cfg.solve_rates is not None and cfg.solve_rate is None and cfg.curriculum is None:
        raise ValueError(
            "data.solve_rates does nothing by itself: add data.solve_rate, [0.1, 0.9] say, to keep the tasks between, "
            "or data.curriculum, which then begins with these rates"
        )
    if cfg.solve_rate is not None and cfg.solve_rate[0] > cfg.solve_rate[1]:
        low, high = cfg.solve_rate
        raise ValueError(f"data.solve_rate: [{low:g}, {high:g}] has the higher rate first: write [{high:g}, {low:g}]")


def check_streaming(cfg: DataConfig) -> None:
    """Raise ValueError where rows cannot be read as they are needed, or settings do nothing with such rows."""
    if not cfg.streaming:
        if "window" in cfg.changed:
            raise ValueError("data.window does nothing without data.streaming: all rows are shuffled")
        return
    if cfg.source is None or is_builtin(cfg.source):
        raise ValueError("data.streaming is for files and Hub datasets; these rows are made here, all at once")
    if "window" in cfg.changed and not cfg.shuffle:
        raise ValueError("data.window does nothing with data.shuffle: false: the rows keep their order")
    if beside := sorted(cfg.changed & {"curriculum", "sampler", "solve_rate", "solve_rates"}):
        raise ValueError(
            f"data.{beside[0]} needs all rows, and with data.streaming nobody knows more of them than a window: leave "
            "out one of them"
        )


SELECTED_BY = "environment"
"""The column whose value names the environment of a row."""


class DataConfig(Section):
    source: Name | Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Where rows come from: a .jsonl, .json, .csv or .parquet file, a list of such files or a pattern such as
    `data/*.jsonl`, a folder that `save_to_disk` wrote, a Hub dataset, or a built-in task: `builtin:arithmetic`,
    `builtin:countdown`, `builtin:sorting` or `builtin:format`, and of several turns `builtin:guess`, `builtin:shop` or
    `builtin:walk`."""
    use: str | None = None
    """Instead of `source`: a function of yours that returns the rows, `file.py:function`, `file.py` (of one function)
    or `package.module:function`. It returns a list of dicts, a `datasets.Dataset` or any other iterable of dicts that
    ends, and the same rows every time. If it takes `split`, it gets `data.split`, and `eval.split` for held-out
    rows."""
    kwargs: dict[str, Any] = {}
    """Arguments for the function in `use`."""
    config: str | None = None
    """Configuration of a Hub dataset, such as `socratic`. Default: its only one, or `main` where there are several."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    split: str = "train"
    """Split to train on. Files are one split, `train`."""
    shuffle: bool = True
    """Visit the rows of each epoch in a new order, drawn from the seed. false: in their own order, every epoch."""
    streaming: bool = False
    """Read rows as they are needed, in the place of all before the first step: for Hub datasets and files of many
    gigabytes. Prompts are then planned for by `max_prompt_length`, and rows that cannot be used are found as they
    come."""
    window: Positive = 10_000
    """With `streaming`, the rows that are held at once: so many in a row are shuffled, each window by itself."""
    columns: dict[str, str] = {}
    """Names for columns that prompt and rewards want under another: `{answer: solution}` reads `solution` as `answer`,
    `{answer: reward_model.ground_truth}` a field inside one, `{example: tests.0}` the first item of a list."""
    environment: Name | None = None
    """Which of the recipe's `environments` all tasks begin. Default: the column `environment` of each row says it."""
    prompt: str = "prompt"
    """A column of text or of chat messages, or a template over columns of text and numbers: `"{question} Think
    first."`."""
    continue_final_message: bool = False
    """Chat prompts may end with a message of the assistant, which the model then continues (a prefill). false: such a
    row is an error, because that message is mostly the answer."""
    system: str | None = None
    """A system message to put before every prompt, text or messages. Needs the chat template, and messages without a
    system message of their own."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Whether text prompts go through the chat template as a user's message. `auto`: if the model has one. Messages
    always do; with `never` they are an error."""
    chat_template_kwargs: dict[str, Any] = {}
    """Handed to the chat template, such as `enable_thinking: false`."""
    max_prompt_length: Tokens = 1024
    """In tokens. Longer prompts are dropped and counted, never cut."""
    solve_rates: Name | None = None
    """A file that `grpo eval --solve-rates` wrote for these rows: how often a model solved each task. `solve_rate`
    chooses tasks by it, and with `curriculum` tasks begin in the pools that it says. A run that goes on with a
    curriculum has the rates of its checkpoint instead."""
    solve_rate: tuple[Fraction, Fraction] | None = None
    """Keep the tasks whose rate in `solve_rates` is between these two, both included: `[0.1, 0.9]`. Tasks without a
    rate in the file are left out."""
    curriculum: CurriculumConfig | None = None
    """Draw tasks by how often they were solved when they were last sampled, with replacement, in the place of epochs.
    `{}` is the defaults: few hard tasks, few easy ones."""
    sampler: str | None = None
    """A class of yours that chooses the tasks of each step, `file.py:Class` or `package.module:Class`: see
    `grpo.data.source.Source`. It is made with the stream of these rows."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources in the place of `source`, each with a `ratio`. What a source leaves out, such as `prompt`, it has
    from this section."""

    @property
    def label(self) -> str:
        """The name of the data in messages: what `source` or `use` says; of many files the first and how many; of
        several sources each."""
        if self.sources:
            return " and ".join(data_label(one.source, one.use) for one in self.sources)
        return data_label(self.source, self.use)

    @property
    def parts(self) -> dict[str, DataConfig]:
        """Where tasks come from, by the name of the source that they say: this section by the name `data`, or what each
        of `sources` comes to."""
        return {one.called: self.part(one) for one in self.sources} if self.sources else {"data": self}

    def part(self, source: SourceConfig) -> DataConfig:
        """What one of `sources` comes to, with what it leaves out."""
        shared = {name: getattr(self, name) for name in self.changed - {"sources"}}
        return DataConfig(**source.among(shared))

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that any source may have."""
        return max(part.max_prompt_length for part in self.parts.values())

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> DataConfig:
        if self.sources:
            check_sources(self)
            return self
        check_origin("data", self.source, self.use, self.kwargs)
        if self.source is None and self.use is None:
            raise ValueError("data.source is missing: name a file, a Hub dataset or a built-in task (or data.use)")
        if self.system is not None and self.chat_template == "never":
            raise ValueError("data.system needs the chat template, and data.chat_template is never")
        if self.chat_template_kwargs and self.chat_template == "never":
            raise ValueError("data.chat_template_kwargs does nothing with data.chat_template: never")
        if unread := self.changed & {"config", "revision"}:
            check_hub_only(f"data.{min(unread)}", self.source, self.use)
        if self.continue_final_message and "{" in self.prompt:
            raise ValueError("data.continue_final_message does nothing with a template: it is for chat messages")
        check_choice(self)
        check_streaming(self)
        ours = {"tokenize", "add_generation_prompt", "continue_final_message", "return_dict"}
        if ours := ours & set(self.chat_template_kwargs):
            raise ValueError(f"data.chat_template_kwargs: {', '.join(sorted(ours))} is not yours to set")
        return self


class EvalConfig(Section):
    source: Name | Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Where held-out prompts come from, in all forms of `data.source`. Default: where training prompts do, and with
    `data.sources` where those of the first source do. Rows of the same place as a source's are prompted and rewarded as
    that source's, others as `data` says."""
    use: str | None = None
    """Instead of `source`: a function that returns the held-out rows, as `data.use`."""
    kwargs: dict[str, Any] = {}
    """Arguments for the function in `eval.use`. The function in `data.use` gets `data.kwargs`."""
    config: str | None = None
    """Configuration of a Hub dataset. Default: `data.config`, if the source is that of `data`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset. Default: `data.revision`, if the source is that of `data`."""
    split: str = "test"
    """Split to evaluate on."""
    every: Positive = 25
    """Steps between evaluations. There is one before the first step and one after the last, too."""
    prompts: Positive = 128
    """How many held-out prompts, from the start of the split. An answer is right if the first of `rewards` gives it 1
    or more, and left out if that gives no score."""
    samples: Positive = 4
    """Completions of each prompt for avg@k and pass@k, at `rollout.temperature`. Greedy is always measured."""

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> EvalConfig:
        check_origin("eval", self.source, self.use, self.kwargs)
        if unread := self.changed & {"config", "revision"}:
            check_hub_only(f"eval.{min(unread)}", self.source, self.use)
        return self
