"""A plan for any machine, from a model's shapes and what an update needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.nn as nn

from grpo.config import OptimConfig
from grpo.errors import TooLargeError
from grpo.generation.controller import widest_of
from grpo.generation.memory import Memory, Need, slots_beside_waiting, widest_that_fits
from grpo.model.logprobs import FEW_LOGITS, LOGITS
from grpo.model.offloading import host_bytes
from grpo.model.quantized import dtype_of
from grpo.planning.choosing import Checkpointing, Choice, reckoned
from grpo.planning.footprint import Footprint
from grpo.planning.graders import UNGRADED, Graders
from grpo.planning.held import FORMER, Held
from grpo.planning.lesson import NONE, TeacherNeeds
from grpo.planning.machines import Machine
from grpo.planning.plan import Plan, ways_out, why_not
from grpo.planning.workload import Workload
from grpo.training.lanes import update_lanes
from grpo.training.packing import Shape

OF_DRAFTS = 4
"""Drafts may have what waiting rows leave, and where that is less, one part in so many of what both could have: a row
whose keys and values are dropped goes through the model again, which costs more than drafts save."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a plan is made from.

    The model's shapes and dtypes are enough: none of its arrays is computed. `states` are the adapter's besides the
    policy, and `footprint` what an update needs without and with checkpointing. `tried` is what a micro-batch was seen
    to take, and `entering` what so many prompts of a length were seen to take on their way through the model: None
    where that is not tried. `lesson` is what a teacher takes, `graders` what reward models take. `held` does not depend
    on the lengths of `load`: given where it is counted already.
    """

    machine: Machine
    load: Workload
    model: nn.Module
    states: int
    decoding: Memory
    footprint: Callable[[bool], Footprint]
    tried: Callable[[Checkpointing, Shape, int], int | None] = lambda *_: None
    entering: Callable[[int, int], int | None] = lambda *_: None
    lesson: TeacherNeeds = NONE
    graders: Graders = UNGRADED
    held: Held | None = None


def plan_on(case: Case) -> tuple[Plan, OptimConfig]:
    """The plan of a run, and its `optim` section with what was `auto` decided.

    Raises TooLargeError for what cannot fit.
    """
    plan, optim = draft_on(case)
    if not plan.fits:
        needed, parts = plan.least
        help = "; ".join(ways_out(plan, case.load))
        raise TooLargeError(f"{why_not(plan, needed, parts)} What would help: {help}.", needed, parts)
    return plan, optim


def draft_on(case: Case) -> tuple[Plan, OptimConfig]:
    """The same whether it fits or not: what does not has as little of everything as there can be.

    Within a limit of the recipe's own, the head has fewer logits at once where more do not fit, or where a GPU, which
    waits for launches, gets larger micro-batches for it.
    """
    machine, most = case.machine, LOGITS[case.machine.gpu]
    made = _draft(case, most)
    if not machine.limited or most <= FEW_LOGITS:
        return made
    fewer = _draft(case, FEW_LOGITS)
    larger = fewer[0].fits_device and fewer[0].micro_batch > made[0].micro_batch
    return made if made[0].fits_device and not larger else fewer


def _draft(case: Case, logits: int) -> tuple[Plan, OptimConfig]:
    machine, load, model, decoding = case.machine, case.load, case.model, case.decoding
    held = case.held or Held.of(load.optim, load.adapter, model, case.states, machine.gpu)
    stays, need = _stays(case, held), load.need()
    room = machine.usable - sum(stays.values())
    spare = room - held.head - held.whole + stays[FORMER]  # there is nothing of that yet
    slots, entering = _slots(case, need, spare)
    chosen = Choice(
        machine,
        load,
        room,
        len(model.layers),
        lambda way: case.lesson.beside(case.footprint(way)).in_chunks(logits),
        lambda way, shape: case.tried(way, shape, logits),
        partial(update_lanes, model),
        partial(reckoned, model),
        partial(_offloaded, case),
        4 * held.trained,
    ).make()
    decoded, waiting = need.bytes(decoding, max(1, slots), entering), need.waiting(decoding)
    left = max(0, spare - decoded)
    # The same is set aside whatever rollout.speculate asks for, which then has no say in what waiting rows may keep.
    unused = max(left - waiting, left // OF_DRAFTS)
    widest = 1 if decoding.narrow or not slots else widest_that_fits(decoding, need, slots, unused)
    fed = min(widest, widest_of(load.rollout.speculate))
    aside, drafts = (need.wider(decoding, slots, width) if width > 1 else 0 for width in (widest, fed))
    plan = Plan(
        steps=load.optim.steps,
        prompts=load.rollout.prompts_per_step,
        rows=load.rows,
        tokens=load.tokens,
        parameters=held.parameters,
        trained=held.trained,
        stays=stays,
        phases=_phases(case, held, decoded + min(waiting, left) - stays[FORMER], chosen.bytes),
        memory=machine.memory,
        slots=slots,
        micro_batch=chosen.tokens,
        checkpointing=chosen.checkpointing,
        kept_bytes=left - aside,
        fed=fed,
        drafts=drafts,
        waiting=waiting,
        depth=len(model.layers),
        shape=chosen.shape,
        lanes=chosen.lanes,
        alone=chosen.alone,
        limited=machine.limited,
        logits=logits,
        cuda=machine.cuda,
        quantized=held.quantized,
        offloaded=_offloaded(case, chosen.checkpointing, chosen.shape),
        host=machine.host,
        whole=held.whole,
    )
    return plan, chosen.optim


def _phases(case: Case, held: Held, rollout: int, update: int) -> dict[str, int]:
    """Bytes beside what stays, by what happens. Weights that are spread over processes are whole outside updates."""
    graded = case.graders.phases(case.load)
    updates = {
        "update": update,
        **({"checkpoint": held.whole + held.saved} if held.saved else {}),
        "optimizer's step": held.step,
    }
    return {
        "rollout": max(0, held.whole + held.head + rollout),
        **{name: held.whole + size for name, size in graded.items()},
        **(updates if case.load.updates else {}),
    }


def _stays(case: Case, held: Held) -> dict[str, int]:
    """Bytes that are held all the time, by what they are for."""
    beside = case.lesson.stays(case.load), case.load.stays(case.machine.cuda), case.graders.stays()
    stays = {name: size for parts in (held.stays, *beside) for name, size in parts.items()}
    return stays if case.load.updates else {**stays, "optimizer": 0, FORMER: 0}


def _offloaded(case: Case, way: Checkpointing, shape: Shape) -> int:
    """Bytes of another memory that the inputs of a micro-batch's checkpointed layers take."""
    if not case.load.optim.offload_activations:
        return 0
    model, depth = case.model, len(case.model.layers)
    layers = depth * way if isinstance(way, bool) else min(way, depth)
    return host_bytes(layers, shape.tokens, int(getattr(model.args, "hidden_size", 0)), dtype_of(model).size)


def _slots(case: Case, need: Need, spare: int) -> tuple[int, int | None]:
    """How many slots fit, and what was seen of the prompts that enter them, if that was tried.

    Where that is more than is reckoned, there are half as many slots, and so on down to one; 0 where not even one fits.
    """
    most, seen = case.load.rollout.max_concurrency, None
    while most:
        try:
            slots = slots_beside_waiting(case.decoding, need, most, spare)
        except TooLargeError:
            return 0, None
        seen = case.entering(need.entering(slots), need.prompt_length)
        if need.bytes(case.decoding, slots, seen) <= spare:
            return slots, seen
        most = slots // 2
    return 0, seen
