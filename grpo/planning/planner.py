"""The planner: makes plans for a policy on this machine, from measurements that are made once."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, cached_property

from grpo.backend import cuda
from grpo.backend.device import memory_bytes, on_gpu
from grpo.config import LossConfig, OptimConfig
from grpo.errors import TooLargeError
from grpo.generation.decoding import Decoding
from grpo.generation.generator import Generator
from grpo.model.policy import Policy
from grpo.model.tensor import silent
from grpo.planning.choosing import Checkpointing, by_footprints
from grpo.planning.drafting import Case, draft_on, plan_on
from grpo.planning.footprint import Footprint, measure_body, measure_footprint, spread_footprint
from grpo.planning.graders import UNGRADED, Graders
from grpo.planning.held import Held, held_spread
from grpo.planning.lengths import FittingLengths
from grpo.planning.lesson import NONE, TeacherNeeds
from grpo.planning.machines import Machine, within
from grpo.planning.plan import Plan
from grpo.planning.positions import limit_of
from grpo.planning.rehearsal import entering, is_cheap, rehearsed
from grpo.planning.workload import Workload
from grpo.recipes import with_settings
from grpo.training.lanes import lanes_worth
from grpo.training.packing import Shape


def make_plan(
    load: Workload, policy: Policy, decoding: Decoding, limit: float | None = None, loss: LossConfig | None = None
) -> tuple[Plan, OptimConfig]:
    """The plan of a run on this machine, and its `optim` section with values instead of `auto`. See `Planner`."""
    return Planner(load, policy, decoding, limit, loss).plan()


class Planner:
    """Plans a workload for a policy: it measures the memory of an update and counts the rest.

    `limit` is `memory.limit_gb`. `lesson` is the memory of a teacher, `graders` that of reward models. Raises UserError
    for a limit above this machine's memory.
    """

    def __init__(
        self,
        load: Workload,
        policy: Policy,
        decoding: Decoding,
        limit: float | None = None,
        loss: LossConfig | None = None,
        lesson: TeacherNeeds = NONE,
        graders: Graders = UNGRADED,
    ) -> None:
        can = {"share_prompts": policy.share_prompts}  # not every model can
        if on_gpu() and load.optim.pack_completions:
            can["pack_completions"] = policy.packs
        if policy.spread is not None:
            can["gradient_checkpointing"] = True  # gathered layers are released and recomputed
        self.policy, self.decoding, self.loss, self.lesson = policy, decoding, loss or LossConfig(), lesson
        self.graders = graders
        parts = load.parts * lanes_worth(policy.model, self.loss)
        self.load = replace(load, optim=with_settings(load.optim, can), parts=parts)
        host = None if policy.vault is None else policy.vault.room()
        self.machine = Machine(allowed(limit), on_gpu(), cuda.available(), limit is not None, host)
        self._footprint, self._body = cache(self._measured), cache(self._body_measured)

    def plan(self) -> tuple[Plan, OptimConfig]:
        """The plan, and the `optim` section. Sets the policy's checkpointing and logits as planned.

        Raises TooLargeError if the run cannot fit: the message says what it needs, why, and what to change.
        """
        try:
            plan, optim = plan_on(replace(self._case, tried=self._tried, entering=self._entering))
        except TooLargeError as error:
            raise TooLargeError(f"{error} {self.lengths.what_fits()}", error.needed, error.parts) from None
        self.policy.gradient_checkpointing, self.policy.logits = plan.checkpointing, plan.logits
        return plan, optim

    @property
    def lengths(self) -> FittingLengths:
        """The lengths of completions that fit on this machine."""
        return FittingLengths(self.load, lambda load: self._draft(load)[0], limit_of(self.policy.model))

    def longest(self) -> int:
        """Tokens of the longest completion that would fit. See `FittingLengths`."""
        return self.lengths.longest()

    def report(self, plan: Plan) -> list[str]:
        """The plan as a table, the longest completion that would fit, and what to change for longer ones."""
        return self.lengths.report(plan)

    def _draft(self, load: Workload) -> tuple[Plan, OptimConfig]:
        return draft_on(replace(self._case, load=load))

    @property
    def _case(self) -> Case:
        """The inputs of a plan in which nothing is tried out."""
        return Case(
            self.machine,
            self.load,
            self.policy.model,
            self._states,
            self.decoding,
            self._footprint,
            lesson=self.lesson,
            graders=self.graders,
            held=self._held,
        )

    @property
    def _states(self) -> int:
        return len(self.policy.adapters.names) - 1

    @cached_property
    def _held(self) -> Held:
        optim, adapter, gpu = self.load.optim, self.load.adapter, self.machine.gpu
        if self.policy.spread is not None:
            return held_spread(optim, adapter, self.policy.spread, self._states, gpu)
        return Held.of(optim, adapter, self.policy.model, self._states, gpu)

    def _measured(self, checkpointing: bool) -> Footprint:
        with silent(self.policy.model):
            found = measure_footprint(self.policy, checkpointing, self.machine.memory)
        return found if self.policy.spread is None else spread_footprint(found, self.policy.spread)

    def _alone(self) -> AbstractContextManager[None]:
        """A block in which this process tries things out without other processes, in the state of an update."""
        return silent(self.policy.model) if self.policy.spread is None else self.policy.spread.rehearsing()

    def _body_measured(self, way: Checkpointing, shape: Shape) -> float:
        with self._alone():
            return measure_body(self.policy, way, [shape])[0]

    def _tried(self, way: Checkpointing, shape: Shape, logits: int) -> int | None:
        """Measured bytes of a micro-batch; None if it is not tried out.

        On a CPU, the whole gradient is measured if that is cheap. On CUDA, the hidden states are measured, because more
        operations are in flight than the linear footprint accounts for. A teacher's KL is counted, not tried out.
        """
        self.policy.logits = logits
        if shape.alone and way and self._footprint(True).alone is not None:
            return None  # the line through two such rows is close enough, and a longer row takes minutes
        if self.machine.cuda:
            body = self._body(way, shape)
            depth = len(self.policy.model.layers)
            return by_footprints(
                lambda way: self.lesson.beside(self._footprint(way)).in_chunks(logits), way, depth, shape, body
            )
        if (
            self.machine.gpu
            or self.lesson.copies > 1
            or not is_cheap(self.policy.model, shape, self.policy.share_prompts)
        ):
            return None
        number = -(-self.load.updated // shape.rows)
        asking = 0 if self.lesson.asking is None else self.lesson.asking.in_chunks(logits).bytes(shape)
        with self._alone():
            return max(asking, rehearsed(self.policy, self.loss, way, shape, number))

    def _entering(self, prompts: int, length: int) -> int | None:
        """Measured bytes of prefilling prompts, on a CPU and if that is cheap; otherwise None."""
        if self.machine.gpu or not is_cheap(self.policy.model, Shape(prompts, length, prompts, 1), shares=True):
            return None
        with silent(self.policy.model):
            return entering(self.decoding, prompts, length)


def decode_as_planned(generator: Generator, plan: Plan) -> None:
    """Set a generator's slots, drafts and memory for waiting rows as planned."""
    generator.slots, generator.kept_bytes = plan.slots, plan.kept_bytes
    if generator.speculation is not None:
        generator.speculation.most = plan.fed


def allowed(limit: float | None) -> int:
    """Bytes that a run may take on this machine: the recipe's limit (in GB), or all memory."""
    return within(memory_bytes(), limit)
