"""What the planner measures of a policy, measured once for each kind of policy: it is half of the time of a toy run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mlx.utils import tree_flatten

from grpo.model.policy import Policy
from grpo.planning.parity import check_parity
from grpo.planning.planner import Planner
from grpo.rollout import RolloutEngine
from grpo.types import Task


def entering_once(found: dict[Any, Any]) -> Callable[..., Any]:
    """`Planner._entering`, unless as many prompts were seen to enter a model of the same kind by the same way."""
    measure = Planner._entering

    def measured(planner: Planner, prompts: int, length: int) -> Any:
        decoding = planner.decoding
        way = type(decoding), decoding.description, decoding.memory(2, 3, 5, 7)
        key = (measure, kind_of(planner.policy), way, prompts, length)
        if key not in found:
            found[key] = measure(planner, prompts, length)
        return found[key]

    return measured


def once(measure: Callable[..., Any], found: dict[Any, Any]) -> Callable[..., Any]:
    """`measure(policy, ...)`, unless a policy of the same kind was measured with the same arguments before."""

    def measured(policy: Policy, *given: Any) -> Any:
        key = (measure, kind_of(policy), *map(repr, given))
        if key not in found:
            found[key] = measure(policy, *given)
        return found[key]

    return measured


def checked_once(found: dict[Any, Any]) -> Callable[..., Any]:
    """`check_parity`, unless decoding agreed with training for a policy of the same kind and the same prompts."""

    def checked(policy: Policy, engine: RolloutEngine, tasks: Sequence[Task], seed: int, *packing: Any) -> Any:
        generator = engine.generator
        prompts = tuple(tuple(task.prompt_ids) for task in tasks)
        way = type(generator.decoding), generator.decoding.description, generator.kv_bits, generator.slots
        key = (check_parity, kind_of(policy), way, policy.temperature, prompts, seed, repr(packing))
        if key not in found:
            found[key] = check_parity(policy, engine, tasks, seed, *packing)
        return found[key]

    return checked


def kind_of(policy: Policy) -> tuple[Any, ...]:
    """All that the memory of a policy's gradients depends on: shapes and dtypes, what trains, and how it computes."""
    model, trained = policy.model, dict(tree_flatten(policy.model.trainable_parameters()))
    arrays = tuple(
        (name, array.shape, str(array.dtype), name in trained) for name, array in tree_flatten(model.parameters())
    )
    ways = policy.share_prompts, policy.most_pairs, repr(policy.adapters.config)
    return type(model), repr(getattr(model, "args", None)), arrays, ways
