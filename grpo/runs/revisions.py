"""The commits on the Hub that a run was made from, so that it is resumed, and used, with the same commits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.backend.hub import Repository, cached_commit
from grpo.config import DataConfig, ModelConfig, Recipe, RewardConfig
from grpo.config.rewardmodel import reward_model_of
from grpo.data.loading import is_local as is_local_data
from grpo.model.load import is_local as is_local_model
from grpo.recipes import with_settings
from grpo.runs.checkpoint import newest_whole, read_state
from grpo.runs.folder import CHECKPOINTS
from grpo.runs.sections import data_of


def revisions_of(cfg: Recipe) -> dict[str, str]:
    """The commits at which the recipe's models, data and held-out data were loaded, by role and name on the Hub."""
    found = {f"model {cfg.model.name}": _model_commit(cfg.model)}
    if cfg.teacher is not None and cfg.teacher.model is not None:
        found[f"teacher {cfg.teacher.model.name}"] = _model_commit(cfg.teacher.model)
    found |= {f"reward model {cfg.name}": _model_commit(cfg) for cfg in map(_reward_model, cfg.rewards) if cfg}
    found |= {_key(section, data): _data_commit(data) for section, data in data_of(cfg).items()}
    return {name: commit for name, commit in found.items() if commit is not None}


def with_revisions(cfg: Recipe, revisions: Mapping[str, str]) -> Recipe:
    """The recipe with these commits as revisions of the models and data that it names without a revision."""
    commits: dict[str, Any] = {}
    if cfg.model.revision is None:
        commits["model.revision"] = revisions.get(f"model {cfg.model.name}")
    if cfg.teacher is not None and cfg.teacher.model is not None and cfg.teacher.model.revision is None:
        commits["teacher.model.revision"] = revisions.get(f"teacher {cfg.teacher.model.name}")
    commits["rewards"] = tuple(_with_revision(reward, revisions) for reward in cfg.rewards)
    if cfg.data.sources:
        commits["data.sources"] = tuple(
            with_settings(one, {"revision": one.revision or revisions.get(_key(name, data))})
            for one, (name, data) in zip(cfg.data.sources, cfg.data.parts.items(), strict=True)
        )
    elif cfg.data.revision is None:
        commits["data.revision"] = revisions.get(_key("data", cfg.data))
    if cfg.eval is not None and cfg.eval.revision is None:
        commits["eval.revision"] = revisions.get(_key("eval", data_of(cfg)["eval"]))
    return with_settings(cfg, commits)


def pinned(cfg: Recipe, checkpoint: Path) -> Recipe:
    """The recipe with the commits that a checkpoint was trained from."""
    return with_revisions(cfg, read_state(checkpoint)["revisions"])


def pinned_to_run(cfg: Recipe, run: Path, adapter: Path | None = None) -> Recipe:
    """The recipe with the commits that the run in the folder `run` was trained from, for use with any `adapter`.

    A run without a checkpoint has no commits: the recipe is returned unchanged.
    """
    checkpoint = checkpoint_of(run, adapter)
    return cfg if checkpoint is None else pinned(cfg, checkpoint)


def checkpoint_of(run: Path, adapter: Path | None = None) -> Path | None:
    """The checkpoint that records what a run was trained from: `adapter` if it is a checkpoint of the run, or else (for
    another adapter, or the base model) the newest intact checkpoint. None if there is none yet."""
    folder = run / CHECKPOINTS
    own = adapter is not None and adapter.resolve().parent == folder.resolve()
    return adapter if own else newest_whole(folder)[0]


def _key(section: str, data: DataConfig) -> str:
    """The key of a commit of data. Two sections may use different revisions of one repository."""
    return f"{section} {data.source}"


def _reward_model(reward: RewardConfig) -> ModelConfig | None:
    """The model of a reward model; None for other rewards."""
    return reward_model_of(reward.kwargs).model(reward.model) if reward.model else None


def _with_revision(reward: RewardConfig, revisions: Mapping[str, str]) -> RewardConfig:
    """The reward with the commit of its model as revision, if it has a model without a revision."""
    model = _reward_model(reward)
    commit = revisions.get(f"reward model {model.name}") if model is not None and model.revision is None else None
    return reward if commit is None else with_settings(reward, {"kwargs": {**reward.kwargs, "revision": commit}})


def _model_commit(cfg: ModelConfig) -> str | None:
    return None if is_local_model(cfg) else cached_commit(Repository("model", cfg.name, cfg.revision), "config.json")


def _data_commit(cfg: DataConfig) -> str | None:
    if is_local_data(cfg) or not isinstance(cfg.source, str):
        return None
    return cached_commit(Repository("dataset", cfg.source, cfg.revision), "README.md")
