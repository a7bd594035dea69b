"""Plans for other machines, from a model's config, with activations estimated from sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.hub import Repository, fetch, one_line
from grpo.backend.ranks import Ranks
from grpo.config import AdapterConfig, JudgeConfig, ModelConfig, Recipe, RewardModelConfig
from grpo.config.judge import judge_of
from grpo.config.rewardmodel import reward_model_of
from grpo.errors import UserError
from grpo.generation.attention import Attention, FusedRowAttention
from grpo.generation.buffers import CacheShape
from grpo.generation.cuda_attention import CudaAttention
from grpo.generation.decoders import ModelDecoder
from grpo.generation.decoding import SharedPrefix
from grpo.generation.packed import packed
from grpo.model.classifier import check_labels, new_classifier
from grpo.model.costs import Costs
from grpo.model.fsdp import Spread
from grpo.model.known import CONFIGS
from grpo.model.mlxlm import new_model
from grpo.model.outline import costs_of, outline
from grpo.model.quantized import quantization
from grpo.model.stored import stored
from grpo.model.widehead import bytes_at_work, widen_head
from grpo.planning.activations import reckoned_footprint
from grpo.planning.drafting import Case, draft_on, plan_on
from grpo.planning.footprint import Footprint, spread_footprint
from grpo.planning.graders import UNGRADED, Graders
from grpo.planning.held import Held, held_spread
from grpo.planning.lengths import FittingLengths
from grpo.planning.lesson import NONE, TeacherNeeds
from grpo.planning.machines import Machine
from grpo.planning.plan import Plan
from grpo.planning.positions import limit_of, position_note
from grpo.planning.workload import Workload
from grpo.recipes import with_settings


@dataclass(frozen=True)
class Elsewhere:
    """A recipe's run on another machine. The model has only shapes and dtypes.

    states     number of adapter states besides the policy
    decoding   the method of decoding that grpo would choose on that machine
    footprint  memory of an update, without or with checkpointing
    lesson     memory of a teacher
    teacher    cost of a second model as teacher
    graders    the reward models
    spread     how processes spread the weights, if they do
    """

    machine: Machine
    load: Workload
    model: nn.Module
    costs: Costs
    states: int
    decoding: SharedPrefix
    footprint: Callable[[bool], Footprint]
    lesson: TeacherNeeds = NONE
    teacher: Costs | None = None
    graders: Graders = UNGRADED
    spread: Spread | None = None

    @classmethod
    def of(cls, cfg: Recipe, config: Mapping[str, Any], machine: Machine, model: nn.Module | None = None) -> Elsewhere:
        """The run of a recipe whose model has this `config.json`. `model` is its outline, if it was already made.

        Raises UserError for a model that mlx-lm does not know.
        """
        model = outline_of(cfg, config) if model is None else model
        costs = costs_of(model)
        prompt = cfg.data.longest_prompt
        waits = bool(cfg.conversations)
        head, second = bytes_at_work(model, machine.gpu), _second(cfg)
        footprint = partial(
            reckoned_footprint, costs, fused=machine.cuda, head=head, offloads=cfg.optim.offload_activations
        )
        spread = _spread(cfg.model, model)
        optim = cfg.optim if spread is None else with_settings(cfg.optim, {"gradient_checkpointing": True})
        return cls(
            machine,
            Workload(optim, cfg.rollout, cfg.adapter, cfg.eval, prompt, prompt, waits=waits),
            model,
            costs,
            int(cfg.needs_reference or cfg.adapter.type != "full")  # the reference
            + int(cfg.teacher is not None and cfg.teacher.adapter is not None)
            + int(any(reward.judges for reward in cfg.rewards)),
            _decoding(machine, model, costs, cfg.rollout.kv_bits),
            cache(lambda way: footprint(way) if spread is None else spread_footprint(footprint(way), spread)),
            TeacherNeeds.of(cfg.teacher, model, second, machine.gpu, machine.cuda),
            None if second is None else costs_of(second),
            _graders(cfg, model, machine),
            spread,
        )

    def plan(self) -> Plan:
        """The plan for that machine. Raises TooLargeError if the run cannot fit."""
        return plan_on(self._case)[0]

    @property
    def _case(self) -> Case:
        return Case(
            self.machine,
            self.load,
            self.model,
            self.states,
            self.decoding,
            self.footprint,
            lesson=self.lesson,
            graders=self.graders,
            held=self._held,
        )

    @cached_property
    def _held(self) -> Held:
        optim, adapter, gpu = self.load.optim, self.load.adapter, self.machine.gpu
        if self.spread is not None:
            return held_spread(optim, adapter, self.spread, self.states, gpu)
        return Held.of(optim, adapter, self.model, self.states, gpu)

    @property
    def lengths(self) -> FittingLengths:
        """The lengths of completions that would fit on that machine."""
        return FittingLengths(self.load, self.draft, limit_of(self.model))

    def draft(self, load: Workload) -> Plan:
        """The plan of another workload on that machine, whether it fits or not."""
        return draft_on(replace(self._case, load=load))[0]

    def position_note(self) -> str | None:
        """The warning or error of a run whose longest sequences are beyond the model's positions; None if they fit."""
        try:
            return position_note(self.model, self.load.longest, self.load.rollout.max_completion_length)
        except UserError as error:
            return str(error)


def outline_of(cfg: Recipe, config: Mapping[str, Any]) -> nn.Module:
    """The shapes and dtypes of a recipe's model with its adapter: the same for every machine."""
    return _model(cfg.model, config, cfg.adapter)


def _model(
    cfg: ModelConfig,
    config: Mapping[str, Any],
    adapter: AdapterConfig | None,
    make: Callable[[Mapping[str, Any]], nn.Module] = new_model,
) -> nn.Module:
    dtype = None if cfg.dtype == "auto" else getattr(mx, cfg.dtype)
    if cfg.quantize is not None:
        if (former := stored(config)) is not None:
            bits = former.settings["bits"]
            raise UserError(f"model.quantize: {cfg.name} is already quantized, to {bits} bits")
        config = {**config, "quantization": quantization(cfg.quantize).config}
    model = outline(config, adapter, dtype, make, _holders(cfg))
    if cfg.head_dtype != "model" and make is new_model:
        widen_head(model)
    return model


@dataclass(frozen=True)
class _NoGroup:
    """The part of a communication group that MLX uses to divide a layer."""

    processes: int

    def size(self) -> int:
        return self.processes

    def rank(self) -> int:
        return 0


class _Holders(Ranks):
    """Processes that share a model on another machine, as the first process sees them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.group, self.size = _NoGroup(size), size  # type: ignore[assignment]  # nothing is exchanged


def _holders(cfg: ModelConfig) -> Ranks:
    if cfg.shard != "tensor":
        return Ranks()
    return _together(cfg)


def _spread(cfg: ModelConfig, model: nn.Module) -> Spread | None:
    """How the weights of an outline would be spread."""
    return Spread(model, None, None, _together(cfg), Ranks()) if cfg.shard == "fsdp" else None


def _together(cfg: ModelConfig) -> Ranks:
    if cfg.shard_size is None:
        raise UserError(
            "model.shard: a plan for another machine does not know how many processes will be started: set "
            "model.shard_size to the number of processes that share the model"
        )
    return _Holders(cfg.shard_size)


def _second(cfg: Recipe) -> nn.Module | None:
    """The teacher, if it is a second model."""
    if cfg.teacher is None or cfg.teacher.model is None:
        return None
    return _model(cfg.teacher.model, model_config(cfg.teacher.model), None)


def _graders(cfg: Recipe, policy: nn.Module, machine: Machine) -> Graders:
    """The reward models of a recipe, from their configs, and its judges, from the policy's model."""
    found: list[tuple[nn.Module, RewardModelConfig | JudgeConfig]] = []
    for reward in cfg.rewards:
        if reward.judges:
            found.append((policy, judge_of(reward.kwargs)))
        if reward.model:
            settings = reward_model_of(reward.kwargs)
            named = settings.model(reward.model)
            check_labels(config := model_config(named), named.name)
            found.append((_model(named, config, None, new_classifier), settings))
    return Graders.of(found, machine.cuda)


def _decoding(machine: Machine, model: nn.Module, costs: Costs, kv_bits: int | None) -> SharedPrefix:
    """The method of decoding that grpo would choose on that machine, from which the plan gets its memory."""
    attention: Attention = CudaAttention() if machine.cuda and not kv_bits else FusedRowAttention()
    shapes = [CacheShape(costs.kv_heads, costs.head_dim, costs.head_dim, mx.bfloat16)] * costs.depth
    shapes = packed(shapes, kv_bits) if kv_bits else shapes
    return SharedPrefix(model, ModelDecoder(model), attention, shapes, costs.head.outputs, "")


def model_config(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model: a known config, from the model's folder, or from the Hub."""
    if cfg.name in CONFIGS:
        return CONFIGS[cfg.name]
    if cfg.name.startswith("builtin:"):
        raise UserError(
            f"model {cfg.name} has no config.json to estimate from: `grpo train RECIPE --dry-run` prints its plan"
        )
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
