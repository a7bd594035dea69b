"""One prompt answered by a run or a model, for `grpo generate`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo.backend.device import setup
from grpo.backend.random import derive_key
from grpo.config import DataConfig, ModelConfig
from grpo.data.prompts import PromptRenderer
from grpo.errors import UserError
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.adapters import load_adapter
from grpo.model.load import load, looks_like_path, similar
from grpo.model.saved import weights_file
from grpo.plugins import bundled_names
from grpo.recipes import load_recipe, with_settings
from grpo.rollout import at_temperature, sampling_of
from grpo.runs.checkpoint import RECIPE
from grpo.runs.folder import is_run, newest_checkpoint
from grpo.runs.revisions import pinned_to_run

log = logging.getLogger(__name__)

MAX_TOKENS = 512
"""Of an answer by a model that no run has set a limit for."""


def answer(
    target: str,
    prompt: str,
    adapter: Path | None,
    base: bool,
    asked: Mapping[str, Any],
    seed: int,
    template: bool = True,
) -> Iterator[str]:
    """The answer's text in pieces.

    `target` is a run's folder, whose newest checkpoint is used where no `adapter` is named, one of its checkpoints, or
    a model; with `base` no adapter is used. A run answers as it did in training: the prompt goes into its template
    (unless `template` is false) and through the chat template with its system message, and what ends its completions
    ends the answer. `asked` are the fields of `Sampling` that were asked for, in the place of the run's. The answer is
    greedy unless a temperature is among them.

    Raises UserError for a recipe, for what cannot be loaded, and for a template that the prompt does not fill.
    """
    if Path(target).suffix in (".yaml", ".yml") or target in bundled_names("recipes", ".yaml"):
        raise UserError(f"{target} is a recipe; to generate takes a run's folder or a model, such as the recipe's")
    if not Path(target).exists() and looks_like_path(target):
        raise UserError(f"{target}: there is no such folder{similar(Path(target))}")
    _check_no_run_or_adapter(Path(target))
    setup()
    model_cfg, data, folder = ModelConfig(name=target), DataConfig(source=target), Path(target)
    sampling = Sampling(0.0, MAX_TOKENS)
    if not is_run(folder) and is_run(folder.parent.parent):  # a checkpoint of a run
        folder, adapter = folder.parent.parent, adapter or folder
    if is_run(folder):
        adapter = adapter or (None if base else newest_checkpoint(folder))
        recipe = pinned_to_run(load_recipe(folder / RECIPE), folder, adapter)
        if recipe.conversations:
            log.warning("answers a single turn, without the run's environment and tools")
        model_cfg, data, sampling = recipe.model, recipe.data, sampling_of(recipe.rollout)
    data = with_settings(data, {"continue_final_message": False})  # the prompt is text
    if not template:
        data = with_settings(data, {"prompt": "prompt"})
    model, tokenizer = load(model_cfg)
    if adapter is not None and not base:
        load_adapter(model, adapter)
    renderer = PromptRenderer(data, tokenizer)
    task = renderer.task(0, _row(prompt, renderer.columns))
    assert task is not None
    generator = Generator(model, tokenizer, slots=1)
    sampling = replace(at_temperature(sampling, asked.get("temperature", 0.0)), **asked)
    events = generator.stream(Request(task.prompt_ids), sampling, derive_key(seed, "generate"))
    yield from (event.text for event in events)


def _check_no_run_or_adapter(target: Path) -> None:
    """Raise UserError for the name of a run in `runs`, without the folder, and for a saved adapter's folder."""
    if not target.exists() and is_run(Path("runs") / target):
        raise UserError(f"{target}: there is no such folder here. Did you mean {Path('runs') / target}?")
    in_a_run = is_run(target) or is_run(target.parent.parent)
    if not in_a_run and weights_file(target) is not None and not (target / "config.json").exists():
        raise UserError(f"{target} is a saved adapter: name the model it was trained on, with --adapter {target}")


def _row(prompt: str, columns: Sequence[str]) -> dict[str, Any]:
    """The columns that prompts are made of, filled from what was given: text for one, a JSON object for several."""
    if len(columns) == 1:
        return {columns[0]: prompt}
    try:
        row = json.loads(prompt)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not set(columns) <= set(row):
        wanted = json.dumps(dict.fromkeys(columns, "..."))
        raise UserError(
            f"the run's template has {len(columns)} columns: give the prompt as {wanted!r}, or give all of it with "
            "--no-template"
        )
    return row
