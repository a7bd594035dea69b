"""The sections `data` and `eval`, which say where rows come from, and helpers for the names of sources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo.config.curriculum import CurriculumConfig
from grpo.config.section import Fraction, Name, Positive, Section, Tokens
from grpo.config.sources import SourceConfig, check_sources

FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Extensions of data files, and the `datasets` reader of each."""

Origin = str | tuple[str, ...]


def is_files(source: Origin) -> bool:
    """Whether a source names data files: a file, a list of files, or a pattern."""
    return isinstance(source, tuple) or Path(source).suffix in FILE_TYPES or is_pattern(source)


def is_pattern(name: str) -> bool:
    """Whether a name is a pattern of file names. Names of Hub datasets cannot contain `*`, `?` or `[`."""
    return any(character in name for character in "*?[")


def is_builtin(source: Origin) -> bool:
    """Whether a source is a built-in task."""
    return isinstance(source, str) and source.startswith("builtin:")


def origins(source: Origin | None, use: str | None) -> tuple[str, ...]:
    """All sources of rows that a section names."""
    named = source if isinstance(source, tuple) else (source, use)
    return tuple(name for name in named if name)


def data_label(source: Origin | None, use: str | None) -> str:
    """The name of the data in messages: the source or the function; for several files, the first and the number of
    others."""
    if isinstance(source, tuple):
        return source[0] if len(source) == 1 else f"{source[0]} and {len(source) - 1} more"
    return source or use or ""


def check_origin(section: str, source: Origin | None, use: str | None, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError if `source`, `use` and `kwargs` of a section contradict each other."""
    if source is not None and use is not None:
        raise ValueError(
            f"{section}.use and {section}.source both say where rows come from: leave out one of them. On the command "
            f"line, {section}.source=null removes the recipe's source, and {section}.use=null removes its function"
        )
    if kwargs and use is None:
        raise ValueError(f"{section}.kwargs does nothing without {section}.use")
    for name in source if isinstance(source, tuple) else ():
        if not is_files(name):
            raise ValueError(
                f"{section}.source: a list may hold files only ({', '.join(FILE_TYPES)}), and {name!r} is not a file"
            )


def check_hub_only(setting: str, source: Origin | None, use: str | None) -> None:
    """Raise ValueError for a setting of Hub datasets if the rows cannot come from the Hub."""
    if use is not None or (source is not None and (is_builtin(source) or is_files(source))):
        raise ValueError(f"{setting} is for Hub datasets, but this source is not a Hub dataset: leave it out")


def check_choice(cfg: DataConfig) -> None:
    """Raise ValueError if the settings that choose tasks contradict each other."""
    if cfg.curriculum is not None and cfg.sampler is not None:
        raise ValueError("data.curriculum does nothing with data.sampler, which chooses all tasks: leave one out")
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
            "data.solve_rates does nothing alone: add data.solve_rate, such as [0.1, 0.9], to keep the tasks with "
            "rates in this range, or data.curriculum, which then starts with these rates"
        )
    if cfg.solve_rate is not None and cfg.solve_rate[0] > cfg.solve_rate[1]:
        low, high = cfg.solve_rate
        raise ValueError(f"data.solve_rate: [{low:g}, {high:g}] has the higher rate first: write [{high:g}, {low:g}]")


def check_streaming(cfg: DataConfig) -> None:
    """Raise ValueError if the rows cannot be streamed, or if a setting does nothing with streamed rows."""
    if not cfg.streaming:
        if "window" in cfg.changed:
            raise ValueError("data.window does nothing without data.streaming: all rows are shuffled together")
        return
    if cfg.source is None or is_builtin(cfg.source):
        raise ValueError("data.streaming is for files and Hub datasets, but this source creates all its rows at once")
    if "window" in cfg.changed and not cfg.shuffle:
        raise ValueError("data.window does nothing with data.shuffle: false: the rows keep their order")
    if beside := sorted(cfg.changed & {"curriculum", "sampler", "solve_rate", "solve_rates"}):
        raise ValueError(
            f"data.{beside[0]} needs all rows, but data.streaming reads only one window of rows at a time: leave out "
            "one of them"
        )


SELECTED_BY = "environment"
"""The column whose value names the environment of a row."""


class DataConfig(Section):
    source: Name | Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Where rows come from: a .jsonl, .json, .csv or .parquet file; a list of such files; a pattern such as
    `data/*.jsonl`; a folder that `save_to_disk` wrote; a Hub dataset; or a built-in task. Built-in tasks of a single
    turn are `builtin:arithmetic`, `builtin:countdown`, `builtin:sorting` and `builtin:format`. Tasks of several turns
    are `builtin:guess`, `builtin:shop` and `builtin:walk`."""
    use: str | None = None
    """Instead of `source`: your own function that returns the rows, `file.py:function`, `file.py` (if it has one
    function) or `package.module:function`. It returns a list of dicts, a `datasets.Dataset` or any other finite
    iterable of dicts, and the same rows every time. If it has an argument `split`, it gets `data.split` for training
    rows and `eval.split` for held-out rows."""
    kwargs: dict[str, Any] = {}
    """Arguments for the function in `use`."""
    config: str | None = None
    """Configuration of a Hub dataset, such as `socratic`. Default: the only configuration, or `main` if there are
    several."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    split: str = "train"
    """Split to train on. Files have a single split, `train`."""
    shuffle: bool = True
    """Visit the rows in a new random order each epoch, drawn from the seed. false: every epoch visits the rows in their
    own order."""
    streaming: bool = False
    """Read rows when they are needed, instead of all rows before the first step. This is for Hub datasets and files of
    many gigabytes. Memory is then planned for prompts of `max_prompt_length`, and grpo finds unusable rows only when it
    reads them."""
    window: Positive = 10_000
    """With `streaming`, the number of rows in memory. Each window of this many consecutive rows is shuffled
    separately."""
    columns: dict[str, str] = {}
    """New names for columns, as the prompt and the rewards expect them: `{answer: solution}` reads the column
    `solution` as `answer`, `{answer: reward_model.ground_truth}` reads a field inside a column, and `{example:
    tests.0}` reads the first item of a list."""
    environment: Name | None = None
    """The environment among the recipe's `environments` that all tasks use. Default: the column `environment` of each
    row names it."""
    prompt: str = "prompt"
    """A column of text or of chat messages, or a template over columns of text and numbers, such as `"{question} Think
    first."`."""
    continue_final_message: bool = False
    """Allow chat prompts that end with an assistant message, which the model then continues (a prefill). false: such a
    row is an error, because that message is usually the answer."""
    system: str | None = None
    """A system message to put before every prompt, text or messages. It needs the chat template, and messages that have
    no system message of their own."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Whether text prompts go through the chat template as a user message. `auto`: yes if the model has a chat
    template. Messages always go through the chat template; with `never` they are an error."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments for the chat template, such as `enable_thinking: false`."""
    max_prompt_length: Tokens = 1024
    """Maximum prompt length in tokens. Longer prompts are dropped and counted, never truncated."""
    solve_rates: Name | None = None
    """A file that `grpo eval --solve-rates` wrote for these rows: how often a model solved each task. `solve_rate`
    selects tasks by these rates, and `curriculum` puts each task into its first pool by them. A run that resumes with a
    curriculum uses the rates of its checkpoint instead."""
    solve_rate: tuple[Fraction, Fraction] | None = None
    """Keep only the tasks whose rate in `solve_rates` is between these two values, both included, such as `[0.1, 0.9]`.
    Tasks without a rate in the file are left out."""
    curriculum: CurriculumConfig | None = None
    """Draw tasks by how often they were solved when they were last sampled, with replacement, instead of visiting all
    rows in epochs. `{}` uses the defaults: few hard tasks, few easy tasks."""
    sampler: str | None = None
    """Your own class that chooses the tasks of each step, `file.py:Class` or `package.module:Class`: see
    `grpo.data.source.Source`. grpo constructs it with the stream of these rows."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources instead of `source`, each with a `ratio`. For a setting that a source leaves out, such as
    `prompt`, the value in this section applies."""

    @property
    def label(self) -> str:
        """The name of the data in messages: the source or the function of each source, see `data_label`."""
        if self.sources:
            return " and ".join(data_label(one.source, one.use) for one in self.sources)
        return data_label(self.source, self.use)

    @property
    def parts(self) -> dict[str, DataConfig]:
        """The complete section of each source, by the source's name: this section under the name `data`, or a section
        for each of `sources`."""
        return {one.called: self.part(one) for one in self.sources} if self.sources else {"data": self}

    def part(self, source: SourceConfig) -> DataConfig:
        """The complete section of one of `sources`: its settings, and this section's for those that it leaves out."""
        shared = {name: getattr(self, name) for name in self.changed - {"sources"}}
        return DataConfig(**source.among(shared))

    @property
    def longest_prompt(self) -> int:
        """The largest `max_prompt_length` of any source, in tokens."""
        return max(part.max_prompt_length for part in self.parts.values())

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> DataConfig:
        if self.sources:
            check_sources(self)
            return self
        check_origin("data", self.source, self.use, self.kwargs)
        if self.source is None and self.use is None:
            raise ValueError("data.source is missing: name a file, a Hub dataset or a built-in task, or set data.use")
        if self.system is not None and self.chat_template == "never":
            raise ValueError("data.system needs the chat template, and data.chat_template is never: change one of them")
        if self.chat_template_kwargs and self.chat_template == "never":
            raise ValueError("data.chat_template_kwargs does nothing with data.chat_template: never")
        if unread := self.changed & {"config", "revision"}:
            check_hub_only(f"data.{min(unread)}", self.source, self.use)
        if self.continue_final_message and "{" in self.prompt:
            raise ValueError("data.continue_final_message does nothing with a prompt template: it is for chat messages")
        check_choice(self)
        check_streaming(self)
        ours = {"tokenize", "add_generation_prompt", "continue_final_message", "return_dict"}
        if ours := ours & set(self.chat_template_kwargs):
            raise ValueError(f"data.chat_template_kwargs: grpo sets {' and '.join(sorted(ours))} itself: leave it out")
        return self


class EvalConfig(Section):
    source: Name | Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Where held-out prompts come from, in any form that `data.source` takes. Default: the source of the training
    prompts, or the first source of `data.sources`. Rows from the same place as one of the `data.sources` are prompted
    and rewarded like that source's rows. For all other rows, the section `data` applies."""
    use: str | None = None
    """Instead of `source`: a function that returns the held-out rows, in the forms of `data.use`."""
    kwargs: dict[str, Any] = {}
    """Arguments for the function in `eval.use`. The function in `data.use` gets `data.kwargs`."""
    config: str | None = None
    """Configuration of a Hub dataset. Default: `data.config`, if the source is the same as in `data`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset. Default: `data.revision`, if the source is the same as in `data`."""
    split: str = "test"
    """Split to evaluate on."""
    every: Positive = 25
    """Steps between evaluations. The run also evaluates before the first step and after the last."""
    prompts: Positive = 128
    """Number of held-out prompts, from the start of the split. An answer is right if the first of `rewards` gives it 1
    or more. An answer to which that reward gives no score is left out."""
    samples: Positive = 4
    """Completions sampled for each prompt, at `rollout.temperature`, to measure avg@k and pass@k. Greedy decoding is
    always measured as well."""

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> EvalConfig:
        check_origin("eval", self.source, self.use, self.kwargs)
        if unread := self.changed & {"config", "revision"}:
            check_hub_only(f"eval.{min(unread)}", self.source, self.use)
        return self
