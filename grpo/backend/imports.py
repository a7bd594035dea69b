"""What the imports of other packages bring along."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unseen(name: str) -> Iterator[None]:
    """Let imports inside the block do without the optional package `name`, as if it were not installed.

    A package that is already imported stays. After the block it can be imported as always.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # Python's own mark of what cannot be imported
    try:
        yield
    finally:
        sys.modules.pop(name, None)
