"""The planner: plans for one policy on this machine, from measurements that are made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

from grpo.backend import cuda
from grpo.backend.device import memory_bytes, on_gpu
from grpo.config import LossConfig, OptimConfig, RolloutConfig
from grpo.errors import TooLargeError, UserError
from grpo.generation.decoding import Decoding
from grpo.model.policy import Policy
from grpo.planning.choosing import Checkpointing, by_footprints
from grpo.planning.drafting import Case, draft_on, plan_on
from grpo.planning.footprint import measure_body, measure_footprint
from grpo.planning.machines import Machine
from grpo.planning.plan import Plan, size_of, ways_out
from grpo.planning.positions import limit_of
from grpo.planning.rehearsal import entering, is_cheap, rehearsed
from grpo.planning.table import table
from grpo.planning.workload import Workload
from grpo.recipes import with_settings
from grpo.training.lanes import lanes_worth
from grpo.training.packing import Shape

LONGEST = 2**20
"""Tokens of the longest completion that is looked for."""


def make_plan(
    load: Workload, policy: Policy, decoding: Decoding, limit: float | None = None, loss: LossConfig | None = None
) -> tuple[Plan, OptimConfig]:
    """The plan of a run on this machine, and its `optim` section with what was `auto` decided. See `Planner`."""
    return Planner(load, policy, decoding, limit, loss).plan()


class Planner:
    """Plans a workload for a policy: what the update needs is measured, the rest is counted.

    `limit` is the recipe's own, in GB. Raises UserError for one that this machine does not have.
    """

    def __init__(
        self,
        load: Workload,
        policy: Policy,
        decoding: Decoding,
        limit: float | None = None,
        loss: LossConfig | None = None,
    ) -> None:
        can = {"share_prompts": policy.share_prompts}  # not every model that is asked to can
        if on_gpu() and load.optim.pack_completions:
            can["pack_completions"] = policy.packs
        self.policy, self.decoding, self.loss = policy, decoding, loss or LossConfig()
        parts = load.parts * lanes_worth(policy.model, self.loss)
        self.load = replace(load, optim=with_settings(load.optim, can), parts=parts)
        self.machine = Machine(allowed(limit), on_gpu(), cuda.available(), limit is not None)
        self._footprint = cache(partial(measure_footprint, policy))

    def plan(self) -> tuple[Plan, OptimConfig]:
        """The plan; the policy is set to checkpoint as it decides.

        Raises TooLargeError for what cannot fit: what it needs, why, and what to change.
        """
        try:
            plan, optim = plan_on(replace(self._case, tried=self._tried, entering=self._entering))
        except TooLargeError as error:
            raise TooLargeError(f"{error} {self._what_fits()}", error.needed, error.parts) from None
        self.policy.gradient_checkpointing = plan.checkpointing
        return plan, optim

    def longest(self) -> int:
        """Tokens of the longest completion that would fit, as far as the model's positions go; 0 where none fits.

        Found by bisection over plans, with everything else as the recipe has it. Lengths that nobody has tried are
        reckoned by the footprint.
        """
        positions = limit_of(self.policy.model)
        most = LONGEST if positions is None else positions - self.load.longest
        return longest(self._fits, min(most, LONGEST))

    def report(self, plan: Plan) -> list[str]:
        """The plan as a table, the longest completion that would fit, and what to change for longer ones.

        The plan's own length fits, though what was reckoned and not tried may say less.
        """
        length = max(self.longest(), self.load.rollout.max_completion_length)
        more = replace(self.load, rollout=self._of_length(length + max(1, length // 8)))
        draft, _ = self._draft(more)
        if draft.fits:
            why = "more is beyond the model's positions" if length < LONGEST else "longer was not looked for"
            return [*table(plan, self.load), f"longest completion that would fit: {length:,} tokens; {why}"]
        ways = "; ".join(way for way in ways_out(draft, more) if "max_completion_length" not in way)
        return [
            *table(plan, self.load),
            f"longest completion that would fit: about {length:,} tokens; for longer: {ways}",
        ]

    def _what_fits(self) -> str:
        length = min(self.longest(), self.load.rollout.max_completion_length - 1)
        if not length:
            return "Not even completions of one token would fit."
        return f"Completions of up to about {length:,} tokens would fit."

    def _fits(self, length: int) -> bool:
        return self._draft(replace(self.load, rollout=self._of_length(length)))[0].fits

    def _of_length(self, length: int) -> RolloutConfig:
        shortest = min(self.load.rollout.min_completion_length, length - 1)
        return with_settings(self.load.rollout, {"max_completion_length": length, "min_completion_length": shortest})

    def _draft(self, load: Workload) -> tuple[Plan, OptimConfig]:
        return draft_on(replace(self._case, load=load))

    @property
    def _case(self) -> Case:
        """What is planned, where nothing is tried."""
        states = len(self.policy.adapters.names) - 1
        return Case(self.machine, self.load, self.policy.model, states, self.decoding, self._footprint)

    def _tried(self, way: Checkpointing, shape: Shape) -> int | None:
        """Bytes that were seen: on a CPU of the whole gradient where that is cheap, on CUDA of the hidden states', for
        which there is more in flight than a line knows."""
        if self.machine.cuda:
            (body,) = measure_body(self.policy, way, [shape])
            return by_footprints(self._footprint, way, len(self.policy.model.layers), shape, body)
        if self.machine.gpu or not is_cheap(self.policy.model, shape, self.policy.share_prompts):
            return None
        number = -(-self.load.updated // shape.rows)
        return rehearsed(self.policy, self.loss, way, shape, number)

    def _entering(self, prompts: int, length: int) -> int | None:
        """Bytes that were seen of prompts on their way through the model: on a CPU, where that is cheap."""
        if self.machine.gpu or not is_cheap(self.policy.model, Shape(prompts, length, prompts, 1), shares=True):
            return None
        return entering(self.decoding, prompts, length)


def allowed(limit: float | None) -> int:
    """Bytes that a run may take: the recipe's limit (in GB), or what the machine has."""
    there = memory_bytes()
    if limit is None:
        return there
    if limit * 2**30 > there:
        raise UserError(
            f"memory.limit_gb: {limit:g} GB are more than this machine has for MLX ({size_of(there)}): lower it, or "
            "leave it out to plan with all there is"
        )
    return int(limit * 2**30)


def longest(fits: Callable[[int], bool], most: int) -> int:
    """The largest length from 1 to `most` that `fits`, where no longer one fits if a shorter one does not; or 0."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
