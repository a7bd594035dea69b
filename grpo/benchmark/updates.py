"""`grpo bench train --update`: only the update, in several variants."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.benchmark.models import base_model
from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.benchmark.setting import Setting
from grpo.benchmark.work import WEIGHTS, policy_of, recipe, synthetic
from grpo.config import Recipe
from grpo.errors import RunError, UserError
from grpo.model.adapters import Adapters
from grpo.model.policy import Policy
from grpo.objective.groups import with_advantages
from grpo.planning.footprint import measure_footprint
from grpo.training.batches import make_batches, make_minibatches
from grpo.training.packing import Packing, Shape, pack
from grpo.training.update import Updater
from grpo.types import Group

Variants = dict[str, dict[str, Any]]

VARIANTS: Variants = {
    "plain": {"share_prompts": False, "gradient_checkpointing": True, "micro_batch_tokens": 16384, "compile": False},
    "shared": {"gradient_checkpointing": True, "micro_batch_tokens": 16384, "compile": False},
    "shared, kept": {"gradient_checkpointing": False, "micro_batch_tokens": 16384, "compile": False},
    "shared, small": {"gradient_checkpointing": True, "micro_batch_tokens": 4096, "compile": False},
    "shared, compiled": {"gradient_checkpointing": True, "micro_batch_tokens": 16384},
    "shared, kept, compiled": {"gradient_checkpointing": False, "micro_batch_tokens": 16384},
}
"""Settings of the update: the prompt once per completion (plain) or once per group (shared), activations recomputed or
kept, large or small micro-batches, eager or compiled. The first variant is the reference of the others."""

CHECKED_LENGTH = 128
"""Maximum number of tokens of the prompts and completions for the check of the gradient with shared prompts."""


def variant_names(text: str) -> list[str]:
    """The variants in `text`, separated by semicolons; all variants for an empty text. Raises UserError for an unknown
    variant."""
    names = [name.strip() for name in text.split(";") if name.strip()]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"--variants: there is no variant {unknown[0]!r}; the variants are {'; '.join(VARIANTS)}")
    return names or list(VARIANTS)


def compare_updates(setting: Setting, names: Sequence[str], seconds: float) -> list[Measurement]:
    """Variants of one update of one model, in turns. After `seconds`, no variant but the first is warmed up, and the
    other variants are skipped with a note.

    First compares the gradient with shared prompts with the plain gradient.
    """
    print(parity(setting), flush=True)
    model = base_model(setting)
    adapters = policy_of(model, recipe(setting, {}).optim).adapters
    rows = alternate(f"update, {setting}", _sides(setting, names, model, adapters), setting.runs, seconds)
    if left := [name for name in names if name not in {row.side for row in rows}]:
        print(f"skipped after {seconds / 60:g} min (--minutes): {'; '.join(left)}", flush=True)
    return rows


def _sides(setting: Setting, names: Sequence[str], model: nn.Module, adapters: Adapters) -> Iterator[Side]:
    for name in names:
        cfg = recipe(setting, VARIANTS[name])
        policy = Policy(model, adapters, 1.0, cfg.optim.share_prompts, cfg.optim.gradient_checkpointing is True)
        yield update_side(name, policy, cfg, setting)


def update_side(name: str, policy: Policy, cfg: Recipe, setting: Setting) -> Side:
    """One update on synthetic completions, including the making of batches."""
    groups = with_advantages(synthetic(setting, policy.model), WEIGHTS, cfg.advantage, cfg.loss.preset)
    update, packing = Updater(policy, cfg.optim, cfg.loss), packing_of(policy, cfg)
    footprint = measure_footprint(policy, policy.gradient_checkpointing is True)
    planned = mx.get_active_memory() + max(footprint.bytes(shape) for shape in shapes(groups, packing))

    def run() -> Values:
        mx.clear_cache()
        mx.reset_peak_memory()
        start = time.perf_counter()
        update(make_minibatches(groups, cfg.loss, packing, setting.completion_length), 1)
        return {"s": time.perf_counter() - start, "GB": mx.get_peak_memory() / 1e9, "GB planned": planned / 1e9}

    return Side(name, run)


def packing_of(policy: Policy, cfg: Recipe) -> Packing:
    """The packing of a recipe; without packing if the model cannot read several completions in one row."""
    rule = Packing.of(cfg.optim, cfg.rollout)
    return replace(rule, packs=rule.packs and policy.packs)


def shapes(groups: Sequence[Group], packing: Packing) -> list[Shape]:
    """The shapes of an update's micro-batches."""
    rows = [(group.task, rollout) for group in groups for rollout in group.rollouts]
    return [shape for _, shape in pack(rows, packing)]


def parity(setting: Setting) -> str:
    """A line with the difference between the gradient with shared prompts and the plain gradient on this machine.

    Uses a small part of the setting. Raises RunError if the difference is more than the model's dtype explains.
    """
    prompt_length, completion_length = (
        min(length, CHECKED_LENGTH) for length in (setting.prompt_length, setting.completion_length)
    )
    setting = replace(
        setting, prompts=2, completions=4, prompt_length=prompt_length, completion_length=completion_length
    )
    found = []
    for sharing, checkpointing in ((False, False), (True, False), (True, True)):
        cfg = recipe(setting, {"share_prompts": sharing, "gradient_checkpointing": checkpointing, "compile": False})
        policy = policy_of(base_model(setting), cfg.optim)
        groups = with_advantages(synthetic(setting, policy.model), WEIGHTS, cfg.advantage, cfg.loss.preset)
        adapters = policy.adapters
        drawn = {path: mx.random.normal(a.shape, key=mx.random.key(5)) * 0.01 for path, a in adapters.state().items()}
        adapters.load_state({path: array.astype(policy.dtype) for path, array in drawn.items()})
        batches = make_batches(groups, cfg.loss, packing_of(policy, cfg), setting.completion_length)
        found.append(Updater(policy, cfg.optim, cfg.loss).gradient(batches).arrays)
    plain, *others = found
    norm = _norm(plain)
    gaps = [_norm({path: array - plain[path] for path, array in other.items()}) / norm for other in others]
    bound = 1e-3 if policy.dtype == mx.float32 else 5e-2
    line = f"gradient, shared against plain: {gaps[0]:.1e} of its norm, checkpointed {gaps[1]:.1e} (bound {bound:.0e})"
    if not max(gaps) <= bound:
        raise RunError(line)
    return line


def _norm(tree: dict[str, mx.array]) -> float:
    total: Any = sum((array**2).sum() for array in tree.values())
    return math.sqrt(total.item())
