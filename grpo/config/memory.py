"""The section `memory`: how much of the machine's memory a run may take."""

from __future__ import annotations

from grpo.config.section import Above0, Section


class MemoryConfig(Section):
    limit_gb: Above0 | None = None
    """Maximum memory that MLX may use in each process, in gigabytes (2^30 bytes): weights, rollouts, updates and
    caches. The plan chooses slots, micro-batches and checkpointed layers to stay below the limit, and refuses a recipe
    that cannot fit. Default: the memory of the machine, minus a tenth for other programs, unless the smallest
    micro-batch needs that tenth."""
