"""What a recipe takes on a machine that is not at hand: memory by the plan, time by the machine's limits.

Every prompt and completion counts at its longest, dynamic sampling as once, and rewards as no time. On CUDA more is in
flight than what is counted here: up to three times as much was measured (RESULTS.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.hub import Repository, fetch, one_line
from grpo.benchmark.machines import CHIPS, Chip
from grpo.config import ModelConfig, Recipe
from grpo.errors import TooLargeError, UserError
from grpo.generation.attention import Attention, FusedRowAttention
from grpo.generation.buffers import CacheShape
from grpo.generation.cuda_attention import CudaAttention
from grpo.generation.decoders import ModelDecoder
from grpo.generation.decoding import SharedPrefix
from grpo.model.costs import Costs, Work
from grpo.model.known import CONFIGS
from grpo.model.outline import costs_of, outline
from grpo.training.activations import reckoned_footprint
from grpo.training.plan import Machine, Plan, plan_on

NOTHING = Work(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes at the peak; seconds of a step and of the run at the machine's limits: they take longer than that."""

    chip: Chip
    bytes: int
    step: float
    run: float

    def line(self) -> str:
        memory = f"{self.bytes / 2**30:.1f} GB"
        return f"{self.chip.name:<14}{memory:>8}   step {self._span(self.step):<18} run {self._span(self.run)}".rstrip()

    def _span(self, least: float) -> str:
        reached = self.chip.reached
        return f"over {_time(least)}" if reached is None else f"{_time(least)} to {_time(least / reached)}"


def estimates(cfg: Recipe) -> list[str]:
    """A line for each machine. Raises UserError for a model of which there is no config."""
    config = model_config(cfg)
    return [_line(chip, cfg, config) for chip in CHIPS]


def _line(chip: Chip, cfg: Recipe, config: Mapping[str, Any]) -> str:
    try:
        return estimate(chip, cfg, config).line()
    except TooLargeError:
        return f"{chip.name:<14}does not fit"


def estimate(chip: Chip, cfg: Recipe, config: Mapping[str, Any]) -> Estimate:
    """Of one recipe on one machine. Raises TooLargeError for what cannot fit."""
    dtype = None if cfg.model.dtype == "auto" else getattr(mx, cfg.model.dtype)
    if cfg.model.quantize is not None:
        config = {**config, "quantization": {"group_size": 64, "bits": cfg.model.quantize}}
    model = outline(config, cfg.adapter, dtype)
    costs = costs_of(model)
    states = int(cfg.needs_reference or cfg.adapter.type != "full")  # the reference
    prompt = cfg.data.max_prompt_length
    plan, _ = plan_on(
        Machine(chip.memory, gpu=True, cuda=chip.backend == "cuda"),
        cfg,
        model,
        states,
        _decoding(chip, model, costs),
        (prompt, prompt),
        partial(reckoned_footprint, costs, fused=chip.backend == "cuda"),
    )
    step = _sampling(costs, cfg, plan, plan.prompts, plan.rows) + _updates(costs, cfg, plan)
    evaluations = NOTHING
    if cfg.eval is not None:
        rows = cfg.eval.prompts * (cfg.eval.samples + 1)  # and the greedy one
        evaluations = _sampling(costs, cfg, plan, cfg.eval.prompts, rows) * (cfg.optim.steps // cfg.eval.every + 1)
    seconds = partial(Work.seconds, flops_per_second=chip.flops, bytes_per_second=chip.bandwidth)
    return Estimate(chip, plan.total, seconds(step), seconds(step) * cfg.optim.steps + seconds(evaluations))


def _decoding(chip: Chip, model: nn.Module, costs: Costs) -> SharedPrefix:
    """As it would be chosen there, for what it holds."""
    attention: Attention = CudaAttention() if chip.backend == "cuda" else FusedRowAttention()
    shape = CacheShape(costs.kv_heads, costs.head_dim, costs.head_dim, mx.bfloat16)
    return SharedPrefix(model, ModelDecoder(model), attention, [shape] * costs.depth, costs.head.outputs, "")


def _sampling(costs: Costs, cfg: Recipe, plan: Plan, prompts: int, rows: int) -> Work:
    """Prompts once, then so many rows through the slots, in the middle of their lengths."""
    prompt, length = cfg.data.max_prompt_length, cfg.rollout.max_completion_length
    slots = min(plan.slots, rows)
    groups = max(1, round(slots * prompts / rows))
    one = costs.decode(slots, prompt + length // 2, prompt, groups)
    return costs.prefill(prompts, prompt) + one * (length * rows / slots)


def _updates(costs: Costs, cfg: Recipe, plan: Plan) -> Work:
    """All that goes through the model after sampling: updates, and what they are held against."""
    rollout, passes = cfg.rollout, cfg.optim.num_iterations
    sizes = plan.prompts, cfg.data.max_prompt_length, rollout.num_generations, rollout.max_completion_length
    several = passes * cfg.optim.num_minibatches > 1
    measured = 1 / cfg.kl_every if cfg.kl_every else 0
    logprobs = costs.logprobs(*sizes) * (cfg.has_penalty + several + measured)
    return costs.update(*sizes) * passes + costs.forward(*sizes) * (passes * plan.checkpointing) + logprobs


def model_config(cfg: Recipe) -> dict[str, Any]:
    """The `config.json` of the recipe's model: known, in its folder, or on the Hub."""
    if cfg.model.name in CONFIGS:
        return CONFIGS[cfg.model.name]
    if cfg.model.name.startswith("builtin:"):
        raise UserError(f"model {cfg.model.name} is made where it is used: `grpo train ... --dry-run` has its plan")
    file = Path(cfg.model.name).expanduser() / "config.json"
    file = file if file.is_file() else _fetched(cfg.model)
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model {cfg.model.name}: its config.json is not JSON: {one_line(error)}") from error
    return config


def _fetched(model: ModelConfig) -> Path:
    from huggingface_hub import hf_hub_download

    def download(cached: bool) -> str:
        return hf_hub_download(model.name, "config.json", revision=model.revision, local_files_only=cached)

    return Path(fetch(Repository("model", model.name, model.revision), download))


def _time(seconds: float) -> str:
    """Two digits are more than such a figure is good for."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 100 else f"{round(seconds / size, -1):.0f} {unit}"
    return f"{seconds:.1g} s"
