"""Checks on a small model with random weights that decoding and training agree on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from grpo.doctor.finding import Finding
from grpo.errors import RunError, UserError

if TYPE_CHECKING:
    from grpo.model.policy import Policy
    from grpo.rollout import RolloutEngine

LENGTHS = (3, 17, 40, 9)
"""Lengths of the prompts in tokens. They differ, because batched decoding fails for rows at different positions."""


def toy() -> tuple[Policy, RolloutEngine]:
    """Return a Qwen3 of one million parameters with a new LoRA adapter, and an engine that samples from it."""
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
    """Check, as before every run, that decoding and teacher forcing agree.

    The check uses the fastest path, and mlx-lm's caches. The fastest path has its own rotary embedding. mlx-lm's caches
    use MLX's embedding, which was wrong for rows at different positions. If a fast path of decoding or of the update
    does not support this model, the result is a warning with the reason.
    """
    from grpo.generation.batchcaches import BatchCaches
    from grpo.planning.parity import check_parity
    from grpo.types import Task

    policy, engine = make()
    tasks = [Task(n, "", tuple(range(1, length + 1)), {}) for n, length in enumerate(LENGTHS)]
    generator, agreed = engine.generator, []
    remedy = "reinstall MLX (see versions and backends); if that does not help, report it with `grpo doctor --json`"
    found = generator.decoding
    ways = {found.description: found, "mlx-lm's batch caches": BatchCaches(policy.model, found.vocabulary)}
    for way, decoding in ways.items():
        generator.decoding = decoding
        try:
            agreed.append(f"{way}: {check_parity(policy, engine, tasks, seed=0)}")
        except (RunError, UserError) as error:
            return Finding("parity", "fail", f"{way}: {error}", remedy)
    if slow := [*found.refused, *policy.slow]:  # every fast path should support this model
        return Finding("parity", "warn", f"slower than it should be: {'; '.join(slow)}; {'; '.join(agreed)}", remedy)
    return Finding("parity", "ok", "; ".join(agreed))
