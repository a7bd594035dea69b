"""Whether MLX decodes what it trains on, on this machine: asked of a small model with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from grpo.doctor.finding import Finding
from grpo.errors import RunError, UserError

if TYPE_CHECKING:
    from grpo.model.policy import Policy
    from grpo.rollout import RolloutEngine

LENGTHS = (3, 17, 40, 9)
"""Of the prompts, in tokens: batched decoding goes wrong where rows are at different positions."""


def toy() -> tuple[Policy, RolloutEngine]:
    """A Qwen3 of a million parameters with a fresh LoRA, ready to be sampled from."""
    import mlx.core as mx

    from grpo.backend.device import setup
    from grpo.config import AdapterConfig
    from grpo.generation.generator import Generator
    from grpo.generation.sampling import Sampling
    from grpo.model.adapters import Adapters
    from grpo.model.drawn import NoTokenizer, random_model
    from grpo.model.policy import Policy
    from grpo.rollout import RolloutEngine

    setup()
    model = random_model("qwen3-1m")
    policy = Policy(model, Adapters(model, AdapterConfig(), mx.random.key(0)), temperature=1.0)
    generator = Generator(model, NoTokenizer(), slots=len(LENGTHS))
    return policy, RolloutEngine(generator, Sampling(1.0, 1))


def parity(make: Callable[[], tuple[Policy, RolloutEngine]] = toy) -> Finding:
    """The check before every run, that decoding and teacher forcing agree: by the fastest way, and by mlx-lm's caches.

    The first does its own rotary embedding, and the second MLX's, which has been wrong for rows at different positions.
    A fast way that does not serve this model, in decoding or in the update, is a warning with the reason.
    """
    from grpo.generation.batchcaches import BatchCaches
    from grpo.planning.parity import check_parity
    from grpo.types import Task

    policy, engine = make()
    tasks = [Task(n, "", tuple(range(1, length + 1)), {}) for n, length in enumerate(LENGTHS)]
    generator, agreed = engine.generator, []
    remedy = "reinstall MLX (see versions and backends); if it stays, report it with `grpo doctor --json`"
    found = generator.decoding
    ways = {found.description: found, "mlx-lm's batch caches": BatchCaches(policy.model, found.vocabulary)}
    for way, decoding in ways.items():
        generator.decoding = decoding
        try:
            agreed.append(f"{way}: {check_parity(policy, engine, tasks, seed=0)}")
        except (RunError, UserError) as error:
            return Finding("parity", "fail", f"{way}: {error}", remedy)
    if slow := [*found.refused, *policy.slow]:  # this model is one that every fast way is for
        return Finding("parity", "warn", f"slower than it should be: {'; '.join(slow)}; {'; '.join(agreed)}", remedy)
    return Finding("parity", "ok", "; ".join(agreed))
