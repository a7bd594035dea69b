"""How far what several processes measured of a case is from what one process did, relatively."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from test_ranks import flat


def gaps_of_facts(alone: Mapping[str, Any], got: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Of numbers by name, over the largest of one process's."""
    for name, value in alone.items():
        mine, theirs = list(flat([value])), list(flat([got[name]]))
        yield name, max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) / max(map(abs, mine))


def gaps_of_files(case: str, one: Path, several: Path, rank: int, kinds: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Of all arrays of a file together, by their norm; names and shapes must be the same."""
    for kind in kinds:
        whole: Any = mx.load(str(one / f"{case}-{kind}-0.safetensors"))
        theirs: Any = mx.load(str(several / f"{case}-{kind}-{rank}.safetensors"))
        assert {path: a.shape for path, a in whole.items()} == {path: a.shape for path, a in theirs.items()}
        norm = math.sqrt(sum((array.astype(mx.float32) ** 2).sum().item() for array in whole.values()))
        assert norm > 0
        gap = math.sqrt(sum(((whole[p] - theirs[p]).astype(mx.float32) ** 2).sum().item() for p in whole))
        yield kind, gap / norm
