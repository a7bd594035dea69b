"""Modules that have another class for a while, as which they do more than their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn


@contextmanager
def put_before(
    modules: Sequence[nn.Module], first: type, attributes: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Inside the block the class `first`, with these attributes, comes before each module's own."""
    former = [type(module) for module in modules]
    kinds = {kind: type(kind.__name__, (first, kind), dict(attributes or {})) for kind in set(former)}
    try:
        for module, kind in zip(modules, former, strict=True):
            module.__class__ = kinds[kind]
        yield
    finally:
        for module, kind in zip(modules, former, strict=True):
            module.__class__ = kind
