"""Estimates of a recipe's needs on another machine: memory from the plan, time from measurements or lower bounds.

Every prompt and completion counts with its maximum length, dynamic sampling counts as one round, and rewards take no
time unless they are models. Times on CUDA are fitted to measurements on one H200 (`calibration`) and scaled to other
cards. No Mac has been measured: bandwidth and arithmetic give a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from grpo.config import Recipe
from grpo.errors import TooLargeError, UserError
from grpo.model.costs import Costs
from grpo.planning import calibration
from grpo.planning.elsewhere import Elsewhere, model_config, outline_of
from grpo.planning.graders import RewardModelCosts
from grpo.planning.machines import CHIPS, Backend, Chip, Known, Machine, within
from grpo.planning.plan import Plan
from grpo.planning.workload import Workload

WORDS: dict[Known, str] = {"measured": "about", "scaled": "roughly", "bound": "over"}
"""The word before a time: it says how the time is known."""
LEGEND: dict[Known, str] = {
    "measured": "about: fitted to steps of dense 0.6B and 4B models measured on this machine, within 20 %",
    "scaled": "roughly: scaled from an H200 by bandwidth and operations; not measured",
    "bound": "over: a lower bound from bandwidth and operations; not measured",
}

RECKONED = (
    "estimated from the model's sizes, for prompts of data.max_prompt_length tokens; on the machine itself "
    "`grpo train RECIPE --dry-run` measures its plan"
)


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
    model = outline_of(cfg, config)
    return [_line(chip, cfg, config, model) for chip in chips]


def legend(chips: Sequence[Chip]) -> list[str]:
    """Lines that explain the words before the times."""
    return [meaning for known, meaning in LEGEND.items() if any(chip.times == known for chip in chips)]


def _line(chip: Chip, cfg: Recipe, config: Mapping[str, Any], model: nn.Module) -> str:
    try:
        machine = machine_of(chip.memory, chip.backend, cfg)
    except UserError as error:
        return f"{chip.name:<18}{error}"
    try:
        return estimate(chip, cfg, config, model).line()
    except TooLargeError as error:
        largest, size = max(error.parts.items(), key=lambda part: part[1])
        there = "more than memory.limit_gb" if machine.limited else "too much"
        short = f"{_size(error.needed)} needed, {_size(error.needed - machine.memory)} {there}"
        return f"{chip.name:<18}does not fit: {short}; the largest part is {largest}, {_size(size)}"


def estimate(chip: Chip, cfg: Recipe, config: Mapping[str, Any], model: nn.Module | None = None) -> Estimate:
    """The estimate for a recipe on a machine. `model` is the model's outline, if it was already made.

    Raises TooLargeError if the run cannot fit, and UserError for a `memory.limit_gb` above the machine's memory.
    """
    there = Elsewhere.of(cfg, config, machine_of(chip.memory, chip.backend, cfg), model)
    plan, costs, load = there.plan(), there.costs, there.load
    step = _sampling(chip, costs, load, plan, plan.prompts, plan.rows) + _updates(chip, costs, cfg, plan)
    step += 0.0 if there.teacher is None else _asking(chip, there.teacher, cfg, plan)
    step += sum(_grading(chip, one, load, plan.rows) for one in there.graders.models)
    evaluations = 0.0
    if cfg.eval is not None:
        rows = cfg.eval.prompts * (cfg.eval.samples + 1)  # one more for the greedy completion
        often = cfg.optim.steps // cfg.eval.every + 1
        each = _sampling(chip, costs, load, plan, cfg.eval.prompts, rows)
        evaluations = often * (each + sum(_grading(chip, one, load, rows) for one in there.graders.models))
    return Estimate(chip, plan.total, step, step * cfg.optim.steps + evaluations)


def report(cfg: Recipe, memory: int, backend: Backend) -> list[str]:
    """What `grpo train --dry-run` would report about memory on a machine with `memory` bytes, in lines: what takes how
    much, and the longest completion that would fit.

    Raises UserError for a `memory.limit_gb` above the machine's memory.
    """
    there = Elsewhere.of(cfg, model_config(cfg.model), machine_of(memory, backend, cfg))
    lengths, note = there.lengths, there.position_note()
    try:
        lines = lengths.report(there.plan())
    except TooLargeError as error:
        lines = [f"{error} {lengths.what_fits()}"]
    return [*lines, *([note] if note else []), RECKONED]


def machine_of(memory: int, backend: Backend, cfg: Recipe) -> Machine:
    """The machine with `memory` bytes, as a plan needs it, with the recipe's memory limit.

    Raises UserError for a limit above the machine's memory, and for `optim.offload_activations` on a Mac.
    """
    if backend == "metal" and cfg.optim.offload_activations:
        raise UserError(
            "optim.offload_activations works only on CUDA: a Mac's GPU shares the machine's memory, so there is no "
            "other memory to move layers' inputs to. Remove it"
        )
    limit = cfg.memory.limit_gb
    return Machine(within(memory, limit), gpu=True, cuda=backend == "cuda", limited=limit is not None)


def _sampling(chip: Chip, costs: Costs, load: Workload, plan: Plan, prompts: int, rows: int) -> float:
    """Seconds to prefill `prompts` prompts once and to decode `rows` completions in the slots.

    Every decoding step counts like a step in the middle of a completion.
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
    sizes = plan.prompts, cfg.data.longest_prompt, rollout.num_generations, rollout.max_completion_length
    old = passes * cfg.optim.num_minibatches > 1 or cfg.adapter.dropout > 0  # logprobs from before the first update
    chosen = cfg.loss.top_entropy_quantile < 1
    by_adapter = cfg.teacher is not None and cfg.teacher.adapter is not None
    others = cfg.has_penalty + old + chosen + by_adapter + (1 / cfg.kl_every if cfg.kl_every else 0)
    update, logprobs = costs.update(*sizes) + costs.forward(*sizes) * plan.recomputed, costs.logprobs(*sizes)
    if chip.times == "bound":
        return (update * passes + logprobs * others).seconds(chip.flops, chip.bandwidth)
    tokens = plan.prompts * cfg.data.longest_prompt + plan.rows * rollout.max_completion_length
    updates = passes * calibration.update(chip, costs, tokens, update)
    return updates + others * calibration.forward(chip, costs, tokens, logprobs)


def _asking(chip: Chip, teacher: Costs, cfg: Recipe, plan: Plan) -> float:
    """Seconds of a second model's forward pass over a step's completions."""
    prompt, length = cfg.data.longest_prompt, cfg.rollout.max_completion_length
    work = teacher.logprobs(plan.prompts, prompt, cfg.rollout.num_generations, length)
    if chip.times == "bound":
        return work.seconds(chip.flops, chip.bandwidth)
    return calibration.forward(chip, teacher, plan.prompts * prompt + plan.rows * length, work)


def _grading(chip: Chip, grader: RewardModelCosts, load: Workload, rows: int) -> float:
    """Seconds of a reward model's pass over `rows` conversations, each with its own prompt."""
    length = grader.longest(load)
    work = grader.costs.forward(rows, length, 0, 0)
    if chip.times == "bound":
        return work.seconds(chip.flops, chip.bandwidth)
    return calibration.forward(chip, grader.costs, rows * length, work)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GB"


def _time(seconds: float) -> str:
    """A duration with two digits, because the estimate is not more precise."""
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 100 else f"{round(seconds / size, -1):.0f} {unit}"
    return f"{seconds:.1g} s"
