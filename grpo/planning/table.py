"""Shows a plan as a table: what takes memory, how much, and why."""

from __future__ import annotations

from grpo.planning import workload
from grpo.planning.plan import Plan, size_of
from grpo.planning.workload import Workload


def table(plan: Plan, load: Workload) -> list[str]:
    """A line for everything that takes memory, and for the peak."""
    rows = [(name, size, _why_it_stays(name, plan, load)) for name, size in plan.stays.items() if size]
    rows += [(name, size, _why_it_comes(name, plan, load)) for name, size in plan.phases.items()]
    largest = max(plan.phases, key=lambda name: plan.phases[name])
    limit = "memory.limit_gb" if plan.limited else "the machine"
    rows.append(("peak", plan.total, f"of {size_of(plan.memory)} ({limit}): what stays, and the {largest}"))
    if plan.offloaded:
        there = "" if plan.host is None else f"of {size_of(plan.host)} "
        rows.append(("offloaded", plan.offloaded, f"{there}in the host's memory: checkpointed layers' inputs"))
    width = max(len(name) for name, _, _ in rows)
    return [f"{name:<{width}}  {size_of(size):>8}  {why}" for name, size, why in rows]


def _why_it_stays(name: str, plan: Plan, load: Workload) -> str:
    match name:
        case "weights":
            return f"{plan.parameters:,} parameters" + ("" if load.adapter.type == "full" else " and the adapter")
        case "optimizer":
            kept = "moments in 8 bits" if load.optim.moments == "int8" else "in float32"
            return f"{load.optim.optimizer} for {plan.trained:,} trained parameters, {kept}"
        case "teacher":
            return "its weights, if it is a second model, and its values for a step's tokens"
        case workload.OLDER:
            return f"groups of up to {load.rollout.reuse} steps ago (rollout.reuse), at their longest"
        case "reward models":
            return "their weights"
        case "other states":
            return "the reference, and other frozen copies of the trained parameters"
        case _:
            return "restored if a step fails"


def _why_it_comes(name: str, plan: Plan, load: Workload) -> str:
    match name:
        case "rollout":
            length = load.own + load.rollout.max_completion_length
            slots = f"{plan.slots} slots" if plan.slots != 1 else "1 slot"
            bits = load.rollout.kv_bits
            kept = f"keys and values in {bits} bits, and logits" if bits else "keys, values and logits"
            return f"{slots} of {load.longest:,} + {length:,} tokens: {kept}"
        case "reward models' pass":
            return "activations of one batch of completions (kwargs.batch_tokens)"
        case "update":
            together = ", if both peak simultaneously" if plan.lanes == 2 else ""
            return f"activations: {plan.rows_at_once}{plan.checkpointed}{together}"
        case "checkpoint":
            return "weights and optimizer state, gathered from all processes"
        case _:
            return "the gradient, and temporary arrays of the update"
