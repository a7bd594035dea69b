"""One prompt answered by a run or a model, for `grpo generate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from grpo.backend.device import setup
from grpo.backend.random import derive_key
from grpo.config import DataConfig, ModelConfig
from grpo.data.prompts import PromptRenderer
from grpo.errors import UserError
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.adapters import load_adapter
from grpo.model.load import load, looks_like_path, similar
from grpo.plugins import bundled_names
from grpo.recipe import load_recipe
from grpo.training.checkpoint import RECIPE, STATE
from grpo.training.folder import is_run, newest_checkpoint
from grpo.training.revisions import pinned


def answer(
    target: str,
    prompt: str,
    adapter: Path | None,
    base: bool,
    sampling: Sampling,
    seed: int,
) -> Iterator[str]:
    """The answer's text in pieces.

    `target` is a run's folder, whose newest checkpoint is used where no `adapter` is named, one of its checkpoints, or
    a model; with `base` no adapter is used. The prompt is put through the chat template as the run's prompts were.
    Raises UserError for a recipe, and for what cannot be loaded.
    """
    if Path(target).suffix in (".yaml", ".yml") or target in bundled_names("recipes", ".yaml"):
        raise UserError(f"{target} is a recipe; to generate takes a run's folder or a model, such as the recipe's")
    if not Path(target).exists() and looks_like_path(target):
        raise UserError(f"{target}: there is no such folder{similar(Path(target))}")
    setup()
    model_cfg, data, folder = ModelConfig(name=target), DataConfig(source=target), Path(target)
    if not is_run(folder) and is_run(folder.parent.parent):  # a checkpoint of a run
        folder, adapter = folder.parent.parent, adapter or folder
    if is_run(folder):
        recipe = load_recipe(folder / RECIPE)
        adapter = adapter or (None if base else newest_checkpoint(folder))
        if adapter is not None and (adapter / STATE).is_file():
            recipe = pinned(recipe, adapter)
        model_cfg, data = recipe.model, recipe.data.model_copy(update={"prompt": "prompt"})
    model, tokenizer = load(model_cfg)
    if adapter is not None and not base:
        load_adapter(model, adapter)
    task = PromptRenderer(data, tokenizer).task(0, {"prompt": prompt})
    assert task is not None
    generator = Generator(model, tokenizer, slots=1)
    events = generator.stream(Request(task.prompt_ids), sampling, derive_key(seed, "generate"))
    yield from (event.text for event in events)
