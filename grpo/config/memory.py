"""The section `memory`: how much of the machine's memory a run may take."""

from __future__ import annotations

from grpo.config.section import Above0, Section


class MemoryConfig(Section):
    limit_gb: Above0 | None = None
    """Gigabytes (2^30 bytes) that MLX may take in each process, at most: weights, rollouts, updates and caches. The
    plan chooses slots, micro-batches and checkpointed layers by it, and refuses what cannot fit. Default: what the
    machine has, of which a tenth is left to others unless the smallest micro-batch needs it."""
