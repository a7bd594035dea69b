"""Estimates of what a recipe needs on another machine: memory from the plan, time from measurements or limits.

Every prompt and completion counts with its greatest length, dynamic sampling counts as one round, and rewards take no
time. Times on CUDA are fitted to measurements on one H200 (`calibration`) and scaled to other cards. No Mac has been
measured: its bandwidth and arithmetic give a lower bound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.hub import Repository, fetch, one_line
from grpo.config import ModelConfig, Recipe
from grpo.errors import TooLargeError, UserError
from grpo.generation.attention import Attention, FusedRowAttention
from grpo.generation.buffers import CacheShape
from grpo.generation.cuda_attention import CudaAttention
from grpo.generation.decoders import ModelDecoder
from grpo.generation.decoding import SharedPrefix
from grpo.generation.packed import packed
from grpo.model.costs import Costs
from grpo.model.known import CONFIGS
from grpo.model.outline import costs_of, outline
from grpo.model.quantized import quantization
from grpo.model.widehead import bytes_at_work, widen_head
from grpo.planning import calibration
from grpo.planning.activations import reckoned_footprint
from grpo.planning.drafting import Case, plan_on
from grpo.planning.machines import CHIPS, Chip, Known, Machine
from grpo.planning.plan import Plan
from grpo.planning.workload import Workload

WORDS: dict[Known, str] = {"measured": "about", "scaled": "roughly", "bound": "over"}
"""The word before a time, by how the time is known."""
LEGEND: dict[Known, str] = {
    "measured": "about: fitted to steps of dense 0.6B and 4B models measured on this machine, within a fifth",
    "scaled": "roughly: scaled from an H200 by bandwidth and operations; not measured",
    "bound": "over: a lower bound, what bandwidth and operations allow at most; not measured",
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Peak memory in bytes; seconds of a step and of the run, which are lower bounds if `chip.times` is `bound`."""

    chip: Chip
    bytes: int
    step: float
    run: float

    def line(self) -> str:
        word = WORDS[self.chip.times]
        step, run = (f"{word} {_time(seconds)}" for seconds in (self.step, self.run))
        return f"{self.chip.name:<18}{_size(self.bytes):>8}   step {step:<18} run {run}"


def estimates(cfg: Recipe, chips: Sequence[Chip] = CHIPS) -> list[str]:
    """A line for each machine. Raises UserError for a model whose config cannot be found."""
    config = model_config(cfg.model)
    return [_line(chip, cfg, config) for chip in chips]


def legend(chips: Sequence[Chip]) -> list[str]:
    """Lines that explain the words before the times."""
    return [meaning for known, meaning in LEGEND.items() if any(chip.times == known for chip in chips)]


def _line(chip: Chip, cfg: Recipe, config: Mapping[str, Any]) -> str:
    try:
        return estimate(chip, cfg, config).line()
    except TooLargeError as error:
        largest, size = max(error.parts.items(), key=lambda part: part[1])
        memory = _machine(chip, cfg).memory
        there = "more than there are" if memory == chip.memory else "more than memory.limit_gb"
        short = f"{_size(error.needed)} needed, {_size(error.needed - memory)} {there}"
        return f"{chip.name:<18}does not fit: {short}; the largest part is {largest}, {_size(size)}"


def estimate(chip: Chip, cfg: Recipe, config: Mapping[str, Any]) -> Estimate:
    """The estimate for one recipe on one machine. Raises TooLargeError if it cannot fit."""
    dtype = None if cfg.model.dtype == "auto" else getattr(mx, cfg.model.dtype)
    if cfg.model.quantize is not None:
        config = {**config, "quantization": quantization(cfg.model.quantize).config}
    model = outline(config, cfg.adapter, dtype)
    if cfg.model.head_dtype != "model":
        widen_head(model)
    costs = costs_of(model)
    states = int(cfg.needs_reference or cfg.adapter.type != "full")  # the reference
    prompt = cfg.data.max_prompt_length
    waits = bool(cfg.conversations)
    load = Workload(cfg.optim, cfg.rollout, cfg.adapter, cfg.eval, prompt, prompt, waits=waits)
    decoding = _decoding(chip, model, costs, cfg.rollout.kv_bits)
    footprint = partial(reckoned_footprint, costs, fused=chip.backend == "cuda", head=bytes_at_work(model, gpu=True))
    plan, _ = plan_on(Case(_machine(chip, cfg), load, model, states, decoding, footprint))
    step = _sampling(chip, costs, load, plan, plan.prompts, plan.rows) + _updates(chip, costs, cfg, plan)
    evaluations = 0.0
    if cfg.eval is not None:
        rows = cfg.eval.prompts * (cfg.eval.samples + 1)  # and the greedy one
        often = cfg.optim.steps // cfg.eval.every + 1
        evaluations = often * _sampling(chip, costs, load, plan, cfg.eval.prompts, rows)
    return Estimate(chip, plan.total, step, step * cfg.optim.steps + evaluations)


def _machine(chip: Chip, cfg: Recipe) -> Machine:
    """With the recipe's own limit of memory, where the machine has more."""
    limit = None if cfg.memory.limit_gb is None else int(cfg.memory.limit_gb * 2**30)
    limited = limit is not None and limit <= chip.memory
    memory = limit if limited and limit is not None else chip.memory
    return Machine(memory, gpu=True, cuda=chip.backend == "cuda", limited=limited)


def _decoding(chip: Chip, model: nn.Module, costs: Costs, kv_bits: int | None) -> SharedPrefix:
    """The way of decoding that would be chosen on that machine; the plan asks it how much memory it holds."""
    attention: Attention = CudaAttention() if chip.backend == "cuda" and not kv_bits else FusedRowAttention()
    shapes = [CacheShape(costs.kv_heads, costs.head_dim, costs.head_dim, mx.bfloat16)] * costs.depth
    shapes = packed(shapes, kv_bits) if kv_bits else shapes
    return SharedPrefix(model, ModelDecoder(model), attention, shapes, costs.head.outputs, "")


def _sampling(chip: Chip, costs: Costs, load: Workload, plan: Plan, prompts: int, rows: int) -> float:
    """Seconds to read `prompts` prompts once and to decode `rows` completions in the slots.

    Each decoding step counts as a step in the middle of a completion.
    """
    prompt, length = load.prompt_length, load.rollout.max_completion_length
    slots = min(plan.slots, rows)
    groups = max(1, round(slots * prompts / rows))
    step, prefill = costs.decode(slots, prompt + length // 2, prompt, groups), costs.prefill(prompts, prompt)
    steps = length * rows / slots
    if chip.times == "bound":
        return (prefill + step * steps).seconds(chip.flops, chip.bandwidth)
    return calibration.forward(chip, costs, prompts * prompt, prefill) + steps * calibration.decode(chip, costs, step)


def _updates(chip: Chip, costs: Costs, cfg: Recipe, plan: Plan) -> float:
    """Seconds of the passes after sampling: the updates, and the passes for old, reference and entropy values."""
    rollout, passes = cfg.rollout, cfg.optim.num_iterations
    sizes = plan.prompts, cfg.data.max_prompt_length, rollout.num_generations, rollout.max_completion_length
    old = passes * cfg.optim.num_minibatches > 1 or cfg.adapter.dropout > 0  # logprobs from before the first update
    chosen = cfg.loss.top_entropy_quantile < 1
    others = cfg.has_penalty + old + chosen + (1 / cfg.kl_every if cfg.kl_every else 0)
    update, logprobs = costs.update(*sizes) + costs.forward(*sizes) * plan.recomputed, costs.logprobs(*sizes)
    if chip.times == "bound":
        return (update * passes + logprobs * others).seconds(chip.flops, chip.bandwidth)
    tokens = plan.prompts * cfg.data.max_prompt_length + plan.rows * rollout.max_completion_length
    updates = passes * calibration.update(chip, costs, tokens, update)
    return updates + others * calibration.forward(chip, costs, tokens, logprobs)


def model_config(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model: one of the known configs, from its folder, or from the Hub."""
    if cfg.name in CONFIGS:
        return CONFIGS[cfg.name]
    if cfg.name.startswith("builtin:"):
        raise UserError(f"model {cfg.name} is made where it is used: `grpo train ... --dry-run` has its plan")
    file = Path(cfg.name).expanduser() / "config.json"
    file = file if file.is_file() else _fetched(cfg)
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model {cfg.name}: its config.json is not JSON: {one_line(error)}") from error
    return config


def _fetched(model: ModelConfig) -> Path:
    from huggingface_hub import hf_hub_download

    def download(cached: bool) -> str:
        return hf_hub_download(model.name, "config.json", revision=model.revision, local_files_only=cached)

    return Path(fetch(Repository("model", model.name, model.revision), download))


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GB"


def _time(seconds: float) -> str:
    """A duration with two digits: the estimate is no more precise than that."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 100 else f"{round(seconds / size, -1):.0f} {unit}"
    return f"{seconds:.1g} s"
