"""Random keys derived from the seed, the purpose and the step, so that a draw depends on nothing else."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """A 64-bit seed for one purpose (`"rollout"`, `"shuffle"`) at one position (step, epoch, row)."""
    text = ":".join([str(seed), purpose, *map(str, position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def derive_key(seed: int, purpose: str, *position: int) -> mx.array:
    """`derive_seed` as an MLX key (uint32 [2])."""
    import mlx.core as mx

    return mx.random.key(derive_seed(seed, purpose, *position))
