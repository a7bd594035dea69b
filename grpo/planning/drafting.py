"""Makes a plan for any machine, from a model's shapes and the memory of an update."""

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
"""Drafts may use the memory that waiting rows leave, but at least 1/OF_DRAFTS of the memory for both. Waiting rows come
first: a row whose keys and values are dropped goes through the model again, which costs more than drafts save."""


@dataclass(frozen=True, slots=True)
class Case:
    """The inputs of a plan.

    model      only its shapes and dtypes are used: no array is computed
    states     number of adapter states besides the policy
    decoding   memory of decoding
    footprint  memory of an update, without or with checkpointing
    tried      measured bytes of a micro-batch; None if it is not tried out
    entering   measured bytes of prefilling, by number of prompts and their length; None if it is not tried out
    lesson     memory of a teacher
    graders    memory of reward models
    held       what does not depend on the lengths in `load`, if it was already counted
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
    """The plan of a run, and its `optim` section with values instead of `auto`.

    Raises TooLargeError if the run cannot fit.
    """
    plan, optim = draft_on(case)
    if not plan.fits:
        needed, parts = plan.least
        help = "; ".join(ways_out(plan, case.load))
        raise TooLargeError(f"{why_not(plan, needed, parts)} What would help: {help}.", needed, parts)
    return plan, optim


def draft_on(case: Case) -> tuple[Plan, OptimConfig]:
    """As `plan_on`, but without an error: the plan of a run that does not fit has as little of everything as possible.

    Under `memory.limit_gb`, the head computes fewer logits at a time if otherwise the run does not fit, or if that
    allows larger micro-batches.
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
    spare = room - held.head - held.whole + stays[FORMER]  # FORMER is empty during a rollout
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
    # Set aside memory for the widest drafts even if rollout.speculate asks for less, so that the setting does not
    # change what waiting rows may keep.
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
    """Bytes that each phase needs in addition to what stays. Spread weights are whole outside updates."""
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
    """Bytes that stay in memory, by purpose."""
    beside = case.lesson.stays(case.load), case.load.stays(case.machine.cuda), case.graders.stays()
    stays = {name: size for parts in (held.stays, *beside) for name, size in parts.items()}
    return stays if case.load.updates else {**stays, "optimizer": 0, FORMER: 0}


def _offloaded(case: Case, way: Checkpointing, shape: Shape) -> int:
    """Bytes of the host's memory that the offloaded inputs of a micro-batch's checkpointed layers take."""
    if not case.load.optim.offload_activations:
        return 0
    model, depth = case.model, len(case.model.layers)
    layers = depth * way if isinstance(way, bool) else min(way, depth)
    return host_bytes(layers, shape.tokens, int(getattr(model.args, "hidden_size", 0)), dtype_of(model).size)


def _slots(case: Case, need: Need, spare: int) -> tuple[int, int | None]:
    """The number of slots that fit, and the measured bytes of prefilling their prompts, if that was tried out.

    If the measurement shows that they do not fit, the number is halved, down to 1; 0 if not even one slot fits.
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
