"""A model card: the model, the data, the evaluation, the recipe, and the versions."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from grpo.builtin import models as builtin_models
from grpo.config import DataConfig, EnvironmentConfig, EvalConfig, Recipe
from grpo.config.data import origins
from grpo.data.loading import is_local
from grpo.document import Dumper
from grpo.model.load import looks_like_path, model_folder
from grpo.recipes import with_settings
from grpo.runs.checkpoint import read_state
from grpo.tools.license import license_of
from grpo.tools.snippets import BASE, snippet


def model_card(cfg: Recipe, checkpoint: Path, form: str, notes: Sequence[str], repo: str | None = None) -> str:
    """Return the text of an export's `README.md`. `repo` is its Hub repository, if it is uploaded."""
    state = read_state(checkpoint)
    rewards = ", ".join(f"`{short_name(reward.use)}` × {reward.weight:g}" for reward in cfg.rewards)
    rewards = rewards or ("the environment's own" if cfg.conversations else "none")
    lines = [
        f"---\n{yaml.safe_dump(_front_matter(cfg, form), sort_keys=False)}---",
        f"# {Path(cfg.output_dir or 'run').name}",
        f"{_kind(cfg, form)} of `{short_name(cfg.model.name)}`, trained with GRPO (arXiv 2402.03300), loss "
        f"`{cfg.loss.type}`, for {state['step']} steps on {_rows(cfg)}. Rewards: {rewards}.",
        *_teacher(cfg),
        *_conversations(cfg),
        *(f"Note: {note}." for note in notes),
        *_use(cfg, form, repo),
        *_evaluation(state),
        "## Recipe",
        f"```yaml\n{_recipe(cfg)}```",
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in state["versions"].items()) + ".",
    ]
    return "\n\n".join(lines) + "\n"


def _rows(cfg: Recipe) -> str:
    """Return the names of the data sources, as Markdown."""
    return " and ".join(f"`{name}`" for name in data_names(cfg))


def _teacher(cfg: Recipe) -> list[str]:
    """Return a line about the teacher, if there was one."""
    if cfg.teacher is None:
        return []
    who = "another adapter of that model" if cfg.teacher.model is None else f"`{short_name(cfg.teacher.model.name)}`"
    return [f"Its teacher was {who}: on-policy distillation (`teacher.kl: {cfg.teacher.kl}`, arXiv 2306.13649)."]


def _conversations(cfg: Recipe) -> list[str]:
    """Return a line about the environments and tools, if the model was trained in conversations."""
    partners = [short_what(config) for config in cfg.conversations.values() if config.what]
    named = {"environment": partners, "tool": [short_name(tool.use) for tool in cfg.tools]}
    parts = [
        f"the {kind}{'s' if len(uses) > 1 else ''} {', '.join(f'`{use}`' for use in uses)}"
        for kind, uses in named.items()
        if uses
    ]
    return [f"It was trained in multi-turn conversations with {' and '.join(parts)}."] if parts else []


def _kind(cfg: Recipe, form: str) -> str:
    if form == "fused":
        return "Fused weights"
    what = {"lora": "LoRA adapter", "dora": "DoRA adapter", "full": "Trained weights"}[cfg.adapter.type]
    return f"{what} ({'mlx-lm' if form == 'mlx' else 'PEFT'} format)"


def _front_matter(cfg: Recipe, form: str) -> dict[str, Any]:
    matter: dict[str, Any] = {
        "library_name": "peft" if form == "peft" else "mlx",
        "pipeline_tag": "text-generation",
        **license_of(cfg.model),
        "tags": ["grpo", "reinforcement-learning", *([] if form == "fused" else [cfg.adapter.type])],
    }
    if "/" in cfg.model.name and short_name(cfg.model.name) == cfg.model.name:  # a name on the Hub
        matter["base_model"] = cfg.model.name
    if named := [data.source for data in cfg.data.parts.values() if _on_the_hub(data)]:
        matter["datasets"] = named
    return matter


def _on_the_hub(cfg: DataConfig) -> bool:
    """Whether rows come from a dataset on the Hub."""
    return not is_local(cfg) and isinstance(cfg.source, str) and not looks_like_path(cfg.source)


def data_names(cfg: Recipe) -> list[str]:
    """Return the names of the recipe's data sources, without the folders of this machine."""
    return [short_name(data.label) for data in cfg.data.parts.values()]


def short_name(name: str) -> str:
    """Return the name of a dataset, a model, or code. For a file or folder on this machine, only the last part."""
    file, colon, function = name.partition(":")
    local = Path(file).is_absolute() or Path(file).exists()  # a glob pattern does not exist as a file
    return Path(file).name + colon + function if local else name


def short_what(config: EnvironmentConfig) -> str:
    """Return the name of an environment or agent. Each word of a command is shortened, because it may be a file."""
    return shlex.join(map(short_name, config.command)) if config.command else short_name(config.what or "")


def _use(cfg: Recipe, form: str, repo: str | None) -> list[str]:
    """Return a snippet that uses the export, and where to find its base if the base is not on the Hub."""
    name, length = cfg.model.name, cfg.rollout.max_completion_length
    data = next(iter(cfg.data.parts.values()))  # with several sources, prompts like the first source's
    if form == "fused" or name not in builtin_models.NAMES:
        return [snippet(form, short_name(name), repo, cfg.model, data, length)]
    if repo is None:
        folder = model_folder(cfg.model)
        home = folder.is_relative_to(Path.home())
        base = f"~/{folder.relative_to(Path.home())}" if home else str(folder)
        return [snippet(form, base, repo, cfg.model, data, length)]
    made = f"`{BASE}` is a model that `grpo` trains: `grpo generate {name} hi` saves it in a folder of `~/.cache/grpo`."
    return [snippet(form, BASE, repo, cfg.model, data, length), made]


def _recipe(cfg: Recipe) -> str:
    """Return the recipe as YAML, without the folders of this machine."""
    sections: list[DataConfig | EvalConfig] = [*cfg.data.parts.values(), *([cfg.eval] if cfg.eval else [])]
    data = [name for section in sections for name in origins(section.source, section.use)]
    whole = with_settings(cfg, {"output_dir": None}).model_dump(mode="json")
    return yaml.dump(_without_places(whole, {cfg.model.name, *data, *cfg.uses}), Dumper=Dumper, sort_keys=False)


def _without_places(value: Any, names: Collection[str]) -> Any:
    """Return plain data in which these names, and all other paths on this machine, are cut to their last part."""
    if isinstance(value, dict):
        return {key: _without_places(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner, names) for inner in value]
    if isinstance(value, str) and (value in names or (os.path.isabs(value) and os.path.exists(value))):
        return short_name(value)
    return value


def _evaluation(state: Mapping[str, Any]) -> list[str]:
    before, after = state["before"], state["after"]
    if after is None:
        return ["Not evaluated on held-out prompts."]
    heads = f"| | before | after step {after['step']} |\n|---|---|---|"
    rows = [f"| {name} | {_cell(before, name)} | {_cell(after, name)} |" for name in after["values"]]
    by = f"On {after['n']} held-out prompts, graded by `{after['grader']}`, with 95% intervals over prompts:"
    return ["## Evaluation", by, "\n".join([heads, *rows])]


def _cell(metrics: Mapping[str, Any], name: str) -> str:
    if name not in metrics["values"]:
        return ""
    low, high = metrics["intervals"][name]
    return f"{metrics['values'][name]:.3f} ({low:.3f} to {high:.3f})"
