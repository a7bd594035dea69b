"""Answers a prompt with a run or a model, for `grpo generate`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grpo.backend.device import setup
from grpo.backend.random import derive_key
from grpo.config import DataConfig, EnvironmentConfig, ModelConfig, RolloutConfig, ToolConfig
from grpo.data.prompts import PromptRenderer
from grpo.errors import UserError
from grpo.generation.controller import speculation_of
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.adapters import load_adapter
from grpo.model.load import load, looks_like_path, similar
from grpo.model.saved import check_format, weights_file
from grpo.plugins import bundled_names
from grpo.recipes import load_recipe, with_settings
from grpo.rollout import at_temperature, sampling_of
from grpo.runs.checkpoint import RECIPE
from grpo.runs.folder import is_run, newest_checkpoint
from grpo.runs.revisions import pinned_to_run

MAX_TOKENS = 512
"""Maximum number of tokens of an answer, for a model without a run whose recipe sets the limit."""


@dataclass(frozen=True, slots=True)
class Answering:
    """A model that answers prompts.

    model, adapter        the model, and its adapter, if any
    data                  how prompts are rendered
    rollout               the run's section `rollout`; None for a model without a run
    conversations, tools  the run's environments and tools
    """

    model: ModelConfig
    data: DataConfig
    adapter: Path | None
    rollout: RolloutConfig | None = None
    conversations: Mapping[str, EnvironmentConfig] = field(default_factory=dict)
    tools: Sequence[ToolConfig] = ()

    @property
    def sampling(self) -> Sampling:
        """How answers are sampled by default."""
        return Sampling(0.0, MAX_TOKENS) if self.rollout is None else sampling_of(self.rollout)


def find_answering(target: str, adapter: Path | None, base: bool, template: bool = True) -> Answering:
    """Find what `target` names: a run's folder, a checkpoint of a run, or a model.

    A run uses its newest checkpoint unless `adapter` names another adapter; with `base`, no adapter is used. A run
    answers as in training: the prompt fills its template (unless `template` is false), and then the chat template with
    the run's system message. Raises UserError for a recipe, for any other target, and for an invalid adapter.
    """
    if Path(target).suffix in (".yaml", ".yml") or target in bundled_names("recipes", ".yaml"):
        raise UserError(f"{target} is a recipe: give a run's folder, or a model (the recipe's model.name)")
    if not Path(target).exists() and looks_like_path(target):
        raise UserError(f"{target}: there is no such folder{similar(Path(target))}")
    _check_no_run_or_adapter(Path(target))
    found, folder = Answering(ModelConfig(name=target), DataConfig(source=target), adapter), Path(target)
    if not is_run(folder) and is_run(folder.parent.parent):  # a checkpoint of a run
        folder, adapter = folder.parent.parent, adapter or folder
    if is_run(folder):
        adapter = adapter or (None if base else newest_checkpoint(folder))
        cfg = pinned_to_run(load_recipe(folder / RECIPE), folder, adapter)
        data = next(iter(cfg.data.parts.values()))  # the first of several sources
        found = Answering(cfg.model, data, adapter, cfg.rollout, cfg.conversations, cfg.tools)
    data = with_settings(found.data, {"continue_final_message": False})  # the prompt is text
    if not template:
        data = with_settings(data, {"prompt": "prompt"})
    if not base and found.adapter is not None:
        check_format(found.adapter)  # before a model is loaded
    return replace(found, data=data, adapter=None if base else found.adapter)


def answer(found: Answering, prompt: str, asked: Mapping[str, Any], seed: int) -> Iterator[str]:
    """Yield the text of a single-turn answer in pieces. Greedy unless `asked` has a temperature.

    `asked` are fields of `Sampling` that override the run's. Raises UserError if the model cannot be loaded, or if the
    prompt does not fill the template.
    """
    model, tokenizer = loaded(found)
    renderer = PromptRenderer(found.data, tokenizer)
    task = renderer.task(0, row_of(prompt, renderer.columns))
    assert task is not None
    generator = generator_of(found, model, tokenizer)
    sampling = replace(at_temperature(found.sampling, asked.get("temperature", 0.0)), **asked)
    events = generator.stream(Request(task.prompt_ids), sampling, derive_key(seed, "generate"))
    yield from (event.text for event in events)


def generator_of(found: Answering, model: Any, tokenizer: Any) -> Generator:
    """Return a generator that decodes one answer at a time, with the run's speculation."""
    generator = Generator(model, tokenizer, slots=1)
    generator.speculation = speculation_of((found.rollout or RolloutConfig()).speculate)
    return generator


def loaded(found: Answering) -> tuple[Any, Any]:
    """Load the model with its adapter, and its tokenizer."""
    setup()
    model, tokenizer = load(found.model)
    if found.adapter is not None:
        load_adapter(model, found.adapter)
    return model, tokenizer


def _check_no_run_or_adapter(target: Path) -> None:
    """Raise UserError for the name of a run in `runs` without this folder, and for the folder of a saved adapter."""
    if not target.exists() and is_run(Path("runs") / target):
        raise UserError(f"{target}: there is no such folder here. Did you mean {Path('runs') / target}?")
    in_a_run = is_run(target) or is_run(target.parent.parent)
    if not in_a_run and weights_file(target) is not None and not (target / "config.json").exists():
        raise UserError(f"{target} is a saved adapter: name the model it was trained on, and add --adapter {target}")


def row_of(prompt: str, columns: Sequence[str]) -> dict[str, Any]:
    """Return the columns of the prompt's template: one column from text, or several columns from a JSON object."""
    if len(columns) == 1:
        return {columns[0]: prompt}
    row = object_of(prompt, columns)
    if row is None or not set(columns) <= set(row):
        wanted = json.dumps(dict.fromkeys(columns, "..."))
        raise UserError(
            f"the run's template has {len(columns)} columns: give the prompt as {wanted!r}, or give the whole prompt "
            "with --no-template"
        )
    return row


def object_of(prompt: str, columns: Sequence[str]) -> dict[str, Any] | None:
    """Parse a prompt that is a JSON object; None for other text.

    Raises UserError for text that begins like a JSON object but cannot be parsed.
    """
    if not prompt.lstrip().startswith("{"):
        return None
    try:
        row: dict[str, Any] = json.loads(prompt)
    except ValueError as error:
        as_text = json.dumps({columns[0] if columns else "prompt": "{..."})
        raise UserError(
            f"the prompt begins with {{ like a JSON object, but cannot be parsed: {error}. Fix it, or pass a text that "
            f"begins with {{ as {as_text!r}"
        ) from None
    return row
