"""What a run will do and need, in numbers, before it does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend import cuda
from grpo.backend.device import memory_bytes, on_gpu
from grpo.config import AdapterConfig, OptimConfig
from grpo.errors import TooLargeError
from grpo.generation.controller import widest_of
from grpo.generation.decoding import Decoding
from grpo.generation.memory import Memory, slots_beside_waiting, widest_that_fits
from grpo.model.policy import Policy
from grpo.model.widehead import bytes_at_work
from grpo.planning.footprint import Footprint, measure_body, measure_footprint
from grpo.planning.workload import Workload
from grpo.recipes import with_settings
from grpo.training.lanes import update_lanes
from grpo.training.optimizer import Float32Optimizer, bytes_of_a_group
from grpo.training.packing import Shape

AUTO_TOKENS = (16_384, 8_192, 4_096, 2_048, 1_024, 512, 256)
FEW_TOKENS = 2_048
"""Below so many tokens at once a GPU is not kept busy, or with half of them where completions go behind one another and
fill them; a CPU is with a quarter of them, and with 4,096 at most."""
FREE = 0.9
"""Of the memory, what may be planned with."""
MOST_ACTIVATIONS, MOST_ON_CUDA = 3 * 2**30, 12 * 2**30
KEPT_NUMBERS = 3.5
"""What an update keeps of a token, for each number that a layer's matrices make of it."""
ENOUGH_ON_CPU, ENOUGH_TOKENS = 2**28, 1_024
"""A CPU is as fast with micro-batches of no more bytes, but below so many tokens prompts go through too often.
`qwen3-25m`, 4 × 8 × (64 + 64): 2.42 s and 0.41 GB in four, 2.56 s and 1.27 GB in one."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan must know of where it will run: bytes of memory, whether that is a GPU's, and one of CUDA."""

    memory: int
    gpu: bool
    cuda: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """Counts, and bytes by what they are for.

    `fed` is the most tokens that a decoding step may feed a row, as memory allows it (`rollout.speculate`), and
    `drafts` what such a step takes beside a plain one: of memory that nothing else needs. `kept_bytes` are left of the
    memory during a rollout for rows outside the slots; `waiting` is what rows that wait for environments keep there at
    the most. As much of it as there is room for is in the rollout's phase.
    """

    steps: int
    prompts: int
    rows: int
    tokens: int
    parameters: int
    trained: int
    stays: dict[str, int]
    phases: dict[str, int]
    memory: int
    slots: int
    micro_batch: int
    checkpointing: bool
    kept_bytes: int
    waiting: int = 0
    fed: int = 1
    drafts: int = 0

    @property
    def total(self) -> int:
        """Estimated peak: what stays, and the largest of the phases."""
        return sum(self.stays.values()) + max(self.phases.values())

    def lines(self) -> list[str]:
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return [
            f"{steps} of {self.prompts} prompts, {self.rows} completions, at most {self.tokens:,} tokens",
            f"trains {self.trained:,} of {self.parameters:,} parameters",
            *self.needs(),
            *self._of_drafts(),
        ]

    def needs(self) -> list[str]:
        """The lines that say what the run takes of the memory, whatever else it does with what is left."""
        stays = ", ".join(f"{name} {_size(size)}" for name, size in self.stays.items() if size)
        *phases, last = (f"{name} {_size(size)}" for name, size in self.phases.items())
        largest = f"the largest of {', '.join(phases)} and {last}"
        memory = f"memory about {_size(self.total)} of {_size(self.memory)}: {stays}, and {largest}"
        return [
            memory,
            *self._of_waiting(),
            f"updates of {self.micro_batch:,} tokens at once{', layers checkpointed' if self.checkpointing else ''}",
        ]

    def _of_drafts(self) -> list[str]:
        if self.fed == 1:
            return []
        return [f"drafts may take {_size(self.drafts)} more, for steps of up to {self.fed} tokens a row"]

    def _of_waiting(self) -> list[str]:
        if not self.waiting:
            return []
        keep = f"completions that wait for their environments keep up to {_size(self.waiting)} of keys and values"
        if self.waiting <= self.kept_bytes:
            return [keep]
        return [f"{keep}; {_size(self.kept_bytes)} are there, and beyond that the oldest are computed again"]


def make_plan(load: Workload, policy: Policy, decoding: Decoding) -> tuple[Plan, OptimConfig]:
    """The plan of a run on this machine, and its `optim` section with what was `auto` decided.

    What the update needs is measured (`footprint`); the rest is counted. The policy is set to checkpoint as decided.
    Raises TooLargeError for what cannot fit.
    """
    machine = Machine(memory_bytes(), on_gpu(), cuda.available())
    can = {"share_prompts": policy.share_prompts}  # not every model that is asked to can
    if machine.gpu and load.optim.pack_completions:
        can["pack_completions"] = policy.packs
    load = replace(load, optim=with_settings(load.optim, can))
    states = len(policy.adapters.names) - 1
    footprint = partial(measure_footprint, policy)

    def body(checkpointing: bool, shape: Shape) -> float:  # a second to try, and more in flight there than a line knows
        return measure_body(policy, checkpointing, [shape])[0]

    tried = body if machine.cuda else None
    plan, optim = plan_on(machine, load, policy.model, states, decoding, footprint, tried)
    policy.gradient_checkpointing = plan.checkpointing
    return plan, optim


def plan_on(
    machine: Machine,
    load: Workload,
    model: nn.Module,
    states: int,
    decoding: Memory,
    footprint: Callable[[bool], Footprint],
    body: Callable[[bool, Shape], float] | None = None,
) -> tuple[Plan, OptimConfig]:
    """The same on any machine, by a model of which the shapes and dtypes are enough: none of its arrays is computed.

    `states` are the adapter's besides the policy, `footprint` what an update needs without and with checkpointing, and
    `body` what a micro-batch was seen to take, where that is to be tried.
    """
    numbers = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    stays, need = _stays(load.optim, load.adapter, model, states), load.need()
    head = bytes_at_work(model, machine.gpu)
    available = int(FREE * machine.memory) - sum(stays.values()) - head
    slots, too_large = 1, None
    try:
        slots = slots_beside_waiting(decoding, need, load.rollout.max_concurrency, available)
    except TooLargeError as error:
        too_large = error
    chosen = _chosen(machine, load, footprint, body, partial(update_lanes, model), partial(_reckoned, model))
    decoded, waiting = need.bytes(decoding, slots), need.waiting(decoding)
    room = max(0, available - decoded)
    fed = 1 if decoding.narrow else widest_that_fits(decoding, need, slots, room, widest_of(load.rollout.speculate))
    drafts = need.wider(decoding, slots, fed) if fed > 1 else 0
    plan = Plan(
        steps=load.optim.steps,
        prompts=load.rollout.prompts_per_step,
        rows=load.rows,
        tokens=load.tokens,
        parameters=_weights(model) - (numbers if load.adapter.type != "full" else 0),
        trained=numbers,
        stays=stays,
        phases={
            "rollout": decoded + head + min(waiting, room),
            "update": chosen.bytes,
            "optimizer's step": _optimizer_step(load.optim, load.adapter, model, stays["optimizer"]),
        },
        memory=machine.memory,
        slots=slots,
        micro_batch=chosen.tokens,
        checkpointing=chosen.checkpointing,
        kept_bytes=room - drafts,
        fed=fed,
        drafts=drafts,
        waiting=waiting,
    )
    if too_large or plan.total > machine.memory:
        raise TooLargeError(str(too_large or _what_would_help(plan)), *_least(plan))
    return plan, chosen.optim


def _what_would_help(plan: Plan) -> str:
    return (
        f"this cannot fit: {'; '.join(plan.needs())}. A smaller or quantized model (model.quantize), shorter "
        "prompts (data.max_prompt_length) or completions, fewer slots (rollout.max_concurrency) or "
        "optim.gradient_checkpointing=true would help"
    )


def _least(plan: Plan) -> tuple[int, dict[str, int]]:
    """Bytes that a plan wants of a machine, and their parts: what stays, and the largest phase.

    Decoding is planned with `FREE` of the memory.
    """
    stays = sum(plan.stays.values())
    wanted = {name: stays + size for name, size in plan.phases.items()}
    wanted["rollout"] = int(wanted["rollout"] / FREE)
    largest = max(wanted, key=lambda name: wanted[name])
    return wanted[largest], {**plan.stays, largest: plan.phases[largest]}


def _stays(optim: OptimConfig, adapter: AdapterConfig, model: nn.Module, states: int) -> dict[str, int]:
    """Bytes that are held all the time, by what they are for."""
    trained = model.trainable_parameters()
    optimizer = _bytes(Float32Optimizer(optim, trained).state)  # nothing of it is computed
    several = _holds_former(adapter) and _several(optim)
    return {
        "weights": _bytes(model.parameters()),
        "optimizer": optimizer,
        "other states": states * _bytes(trained),
        "the state before the step": several * (_bytes(trained) + optimizer),
    }


def _holds_former(adapter: AdapterConfig) -> bool:
    """Whether the arrays of before a step are held until it is done, as `Trainer.wholly` does."""
    return adapter.type != "full"


def _several(optim: OptimConfig) -> bool:
    """Whether a step has more than one update."""
    return optim.num_iterations * optim.num_minibatches > 1


def _optimizer_step(optim: OptimConfig, adapter: AdapterConfig, model: nn.Module, optimizer: int) -> int:
    """Bytes beside what stays: the gradient, and a group at work.

    The state of an adapter before a step is held until the step is done: what the step makes takes the gradient's place
    beside it. (Of several updates that state is counted among what stays.) Whole weights are made in their own place.
    """
    trained = model.trainable_parameters()
    numbers: int = sum(array.size for _, array in tree_flatten(trained))
    made = _bytes(trained) + optimizer if _holds_former(adapter) and not _several(optim) else 0
    return max(4 * numbers, made) + bytes_of_a_group(optim.optimizer, trained)


def _bytes(tree: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))


def _weights(model: nn.Module) -> int:
    """How many parameters there are; of a quantised layer its weights, not the words that they are packed into."""
    count: int = sum(array.size for _, array in tree_flatten(model.parameters()))
    for module in model.modules():
        if hasattr(module, "bits"):
            scales = [module[name].size for name in ("scales", "biases") if name in module]
            count += module.weight.size * 32 // module.bits - module.weight.size - sum(scales)
    return count


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Micro-batches that fit, and what they need."""

    optim: OptimConfig
    tokens: int
    checkpointing: bool
    bytes: int


def _reckoned(model: nn.Module, shape: Shape) -> float:
    """Bytes of a micro-batch's activations, roughly, from sizes alone: float32, no layer checkpointed, scores held."""
    modules = [module for layer in model.layers for module in layer.modules()]
    outputs: int = sum(m["weight"].shape[-2] for m in modules if "weight" in m and m["weight"].ndim > 1)
    scores = 0.75 * int(getattr(model.args, "num_attention_heads", 1)) * (len(model.layers) + 1)
    pairs = shape.rows * shape.length * (shape.prompt_length + shape.length)
    return 4 * (KEPT_NUMBERS * outputs * shape.tokens + scores * pairs)


def _chosen(
    machine: Machine,
    load: Workload,
    footprint: Callable[[bool], Footprint],
    body: Callable[[bool, Shape], float] | None,
    lanes: Callable[[int, int], int] = lambda *_: 1,
    reckoned: Callable[[Shape], float] = lambda _: 0.0,
) -> _Chosen:
    """What the recipe says, or for `auto` what fits and pays.

    A micro-batch takes an eighth of the memory, up to `MOST_ACTIVATIONS` (`MOST_ON_CUDA`): beyond that a larger one
    with its layers checkpointed is faster. Layers are checkpointed where that leaves too few tokens to keep the machine
    busy, or not even the longest row. CUDA waits for launches, so there the largest micro-batch comes first. A CPU is
    as fast with small ones: it takes the largest that is `reckoned` below `ENOUGH_ON_CPU`, because what is measured
    varies a little, and the same recipe must choose the same. As many as it has `lanes` are there at once.
    """
    comfortable = min(machine.memory // 8, MOST_ON_CUDA if machine.cuda else MOST_ACTIVATIONS)
    few = FEW_TOKENS // ((1 + load.packs) if machine.gpu else 4)
    asked, tokens = load.optim.gradient_checkpointing, load.optim.micro_batch_tokens
    ways = (False, True) if asked == "auto" else (bool(asked),)
    sizes = AUTO_TOKENS[0 if machine.gpu else 2 :] if tokens == "auto" else (tokens,)
    order = [(way, size) for size in sizes for way in ways] if machine.cuda else list(product(ways, sizes))
    footprint_of = cache(footprint)  # seconds to measure: of the ways that are come to
    best: _Chosen | None = None
    for checkpointing, size in order:
        largest = load.largest(size, machine.gpu, machine.cuda)
        at_once = 1 if machine.gpu else lanes(largest[0].tokens, -(-load.rows // largest[0].rows))
        needed = at_once * max(footprint_of(checkpointing).bytes(shape) for shape in largest)
        if body is not None and needed <= comfortable:
            tried = ((shape, body(checkpointing, shape)) for shape in largest)
            needed = max(footprint_of(checkpointing).bytes(shape, found) for shape, found in tried)
        optim = with_settings(load.optim, {"micro_batch_tokens": size, "gradient_checkpointing": checkpointing})
        best = _Chosen(optim, size, checkpointing, needed)
        enough = (
            asked != "auto"
            or checkpointing
            or size >= few
            or largest[0].tokens == load.largest(2 * size, machine.gpu, machine.cuda)[0].tokens
        )
        large = not machine.gpu and reckoned(largest[0]) > ENOUGH_ON_CPU
        smaller_will_do = large and tokens == "auto" and size > ENOUGH_TOKENS
        if needed <= comfortable and enough and not smaller_will_do:
            return best
    assert best is not None
    return best


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
