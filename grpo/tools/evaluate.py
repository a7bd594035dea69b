"""Accuracy of a run, a recipe, or a model on held-out prompts, without and with an adapter, for `grpo eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo.config import EvaluationRecipe, Recipe, RewardConfig
from grpo.data.files import is_one_split
from grpo.data.fingerprint import fingerprint
from grpo.data.rates import SolveRates
from grpo.data.rows import Rows
from grpo.data.solved import Solved
from grpo.data.streaming import Streamed
from grpo.errors import RunError, UserError
from grpo.model.load import looks_like_path, similar
from grpo.model.saved import read_adapter
from grpo.plugins import find_recipe, locate_reward
from grpo.recipes import load_recipe, recipe_of, with_settings
from grpo.runs.checkpoint import RECIPE, STATE, read_state, step_of
from grpo.runs.drawing import solved_by
from grpo.runs.folder import find_checkpoint, is_run
from grpo.runs.prepare import prepare
from grpo.runs.revisions import checkpoint_of, pinned_to_run
from grpo.runs.sections import data_of, read_as, without_choice
from grpo.types import EvalMetrics, Group


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """Options that override the recipe. None: the recipe's value."""

    data: str | None = None
    split: str | None = None
    prompt: str | None = None
    reward: str | None = None
    samples: int | None = None
    prompts: int | None = None
    adapter: Path | None = None
    checkpoint: str | None = None
    solve_rates: Path | None = None
    """The file to which the solve rate of each task is written."""

    def settings(self) -> list[str]:
        """Return the options as overrides of a recipe."""
        split = self.split
        if split is None and self.data is not None and is_one_split(self.data):
            split = "train"  # the only split
        named = {
            "eval.source": self.data,
            "eval.split": split,
            "data.prompt": self.prompt,
            "rewards.0.use": self.reward,
            "eval.samples": self.samples,
            "eval.prompts": self.prompts,
        }
        return [f"{name}={value}" for name, value in named.items() if value is not None]


@dataclass(frozen=True, slots=True)
class Measured:
    """Evaluations of a model without and with the adapter, on the same prompts and with the same draws.

    started  the name of the start: the base, or the adapter with which the run began
    before   the evaluation of the start
    after    the evaluation with the adapter; None if there is no adapter
    notes    warnings for the user, one per line
    """

    started: str
    before: EvalMetrics
    after: EvalMetrics | None
    notes: tuple[str, ...] = ()


def measure(target: str, asked: EvalOptions, overrides: Sequence[str]) -> Measured:
    """Evaluate the start of a run (or the base of a recipe, or a model) and the adapter, if there is one.

    `target` is a run's folder (the adapter is its newest checkpoint unless `asked` names another), a recipe, or a
    model. Raises UserError if there is no evaluation data, and RunError if the solve rates cannot be written.
    """
    _check_room(asked.solve_rates)
    folder, settings = Path(target), [*asked.settings(), *overrides]
    adapter = asked.adapter
    if is_run(folder):
        cfg = _graded(folder / RECIPE, asked, overrides)
        adapter = adapter or find_checkpoint(folder, asked.checkpoint or "newest")
        cfg = pinned_to_run(cfg, folder, adapter)
    elif asked.checkpoint is not None:
        raise UserError(f"--checkpoint requires a run, but {target} is not a run")
    elif folder.is_dir() or not _is_recipe(target):
        cfg = _for_model(target, asked, settings)
    else:
        cfg = _graded(find_recipe(target), asked, overrides)
    if cfg.eval is None:
        raise UserError(f"{target}: there is no evaluation data; name it, such as --data held_out.jsonl")
    if asked.adapter is not None:  # a run's own adapter has the shape that the recipe describes
        shape = {**read_adapter(asked.adapter).section(), "path": None}
        cfg = with_settings(cfg, {f"adapter.{name}": value for name, value in shape.items()})
    like = read_as(cfg)
    curriculum = (cfg.data if like is None else cfg.data.parts[like]).curriculum
    cfg = without_choice(cfg)  # it does not train
    if asked.solve_rates is not None and data_of(cfg)["eval"].streaming:
        raise UserError(
            "--solve-rates needs all rows, but with data.streaming their number is unknown: add data.streaming=false"
        )
    prepared = prepare(cfg, trains=False)
    notes = _changed_since(folder, adapter, cfg, prepared.rows["eval"]) if is_run(folder) else ()
    trainer, evaluator = prepared.trainer, prepared.evaluator
    with closing(prepared.opened):
        assert evaluator is not None
        solved = None if asked.solve_rates is None else solved_by(trainer.scorer, curriculum, "eval")
        started = "base" if cfg.adapter.path is None else "start (adapter.path)"
        before, sampled = evaluator.measured(0)
        after: EvalMetrics | None = None
        if adapter is not None:
            trainer.policy.adapters.load(adapter)
            after, sampled = evaluator.measured(step_of(adapter) if (adapter / STATE).is_file() else 0)
        if asked.solve_rates is not None and solved is not None and trainer.ranks.first:
            rows = prepared.rows["eval"]
            assert not isinstance(rows, Streamed), "refused above"
            rates = SolveRates.of(_solve_rates(sampled, solved), rows, _about(cfg, adapter, solved))
            _write(rates, asked.solve_rates)
        return Measured(started, before, after, notes)


def _solve_rates(groups: Sequence[Group], solved: Solved) -> dict[int, float]:
    """Return the solve rate of each task that has a score, by the index of its row."""
    rates = {group.task.index: solved.rate(group.rollouts) for group in groups}
    return {index: rate for index, rate in rates.items() if rate is not None}


def _check_room(path: Path | None) -> None:
    """Raise UserError, before the evaluation, if the file could not be written."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UserError(f"--solve-rates {path}: {what}; name a file, such as rates.jsonl")


def _about(cfg: Recipe, adapter: Path | None, solved: Solved) -> dict[str, Any]:
    """Return how the solve rates were measured, for readers of the file."""
    assert cfg.eval is not None
    data = data_of(cfg)["eval"]
    return {
        "data": data.label,
        "split": data.split,
        "model": cfg.model.name,
        "adapter": adapter and str(adapter),
        "reward": " or ".join(solved.graders),
        "samples": cfg.eval.samples,
        "temperature": cfg.rollout.temperature,
    }


def _write(rates: SolveRates, path: Path) -> None:
    try:
        rates.write(path)
    except OSError as error:
        raise RunError(f"--solve-rates {path}: cannot be written: {error.strerror or error}") from error


ORIGIN = ("source", "use", "kwargs", "config", "split", "columns")
"""The settings that determine the rows."""


def _changed_since(run: Path, adapter: Path | None, cfg: Recipe, rows: Rows | Streamed) -> tuple[str, ...]:
    """Return a warning if the run's held-out rows have changed since its training.

    Empty if other rows are evaluated, and for rows on the Hub, which are pinned to a commit.
    """
    own, now = data_of(load_recipe(run / RECIPE)).get("eval"), data_of(cfg)["eval"]
    checkpoint = checkpoint_of(run, adapter)
    if own is None or checkpoint is None or any(getattr(own, name) != getattr(now, name) for name in ORIGIN):
        return ()
    was = read_state(checkpoint)["inputs"].get("eval")
    if was is None or fingerprint(rows) == was:
        return ()
    return (
        f"warning: {now.label} has changed since the run was trained: these numbers cannot be compared with the "
        "evaluations in eval.jsonl, or with earlier evaluations (all numbers in the table below use the same prompts)",
    )


def _is_recipe(target: str) -> bool:
    if target.startswith("builtin:"):
        return False
    try:
        find_recipe(target)
    except UserError:
        if "/" in target and not target.endswith((".yaml", ".yml")):
            if looks_like_path(target):
                raise UserError(f"{target}: there is no such folder{similar(Path(target))}") from None
            return False  # a model on the Hub
        raise
    return True


def _graded(path: Path, asked: EvalOptions, overrides: Sequence[str]) -> Recipe:
    """Return the recipe with the options.

    If `asked.reward` is one of the recipe's rewards, this reward moves to the first place, where it grades, and keeps
    its settings. Any other reward replaces the first reward, and a reward of the same name.
    """
    own = load_recipe(path, overrides, kind=EvaluationRecipe).rewards
    if asked.reward is not None and not own:  # the recipe has only the environment's reward
        overrides = [*overrides, f"rewards=[{{use: {json.dumps(asked.reward)}}}]"]
        asked = replace(asked, reward=None)
    cfg = load_recipe(path, [*asked.settings(), *overrides], kind=EvaluationRecipe)
    if asked.reward is None:
        return cfg
    first, *others = cfg.rewards
    if meant := [reward for reward in own if _is_meant(reward, asked.reward, first)]:
        rewards = (meant[0], *(reward for reward in own if reward is not meant[0]))
    else:
        rewards = (first, *(reward for reward in others if _called(reward) != _called(first)))
    return with_settings(cfg, {"rewards": rewards})


def _is_meant(reward: RewardConfig, use: str, found: RewardConfig) -> bool:
    """Whether `use` means this reward, by its name or its code. `found` is the reward that `use` was resolved to."""
    where = locate_reward(reward.use).where
    return _called(reward) == use or found.use in (reward.use, where, where.removesuffix(":reward"))


def _called(reward: RewardConfig) -> str:
    return reward.name or locate_reward(reward.use).name


def _for_model(name: str, asked: EvalOptions, settings: Sequence[str]) -> Recipe:
    """Return a recipe that only evaluates a model."""
    if asked.data is None:
        raise UserError(
            f"{name} is neither a run nor a recipe. To evaluate it as a model, add --data (and usually --prompt and "
            "--reward)"
        )
    fixed: dict[str, Any] = {
        "model": {"name": name},
        "data": {"source": asked.data, "split": asked.split or "train"},
        "rewards": [{"use": "math_answer"}],
        "optim": {"steps": 1},
    }
    return recipe_of(fixed, f"eval {name}", settings, EvaluationRecipe)
