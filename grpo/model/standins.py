"""Gives modules a subclass of their class temporarily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn


@contextmanager
def put_before(
    modules: Sequence[nn.Module], first: type, attributes: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Inside the block, each module's class is a subclass of `first` and of its own class, with these attributes.

    `first` comes first in the method resolution order.
    """
    former = [type(module) for module in modules]
    kinds = {kind: type(kind.__name__, (first, kind), dict(attributes or {})) for kind in set(former)}
    try:
        for module, kind in zip(modules, former, strict=True):
            module.__class__ = kinds[kind]
        yield
    finally:
        for module, kind in zip(modules, former, strict=True):
            module.__class__ = kind
