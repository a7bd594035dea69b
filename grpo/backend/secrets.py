"""Secrets of the environment, kept out of what is printed and stored: an error may quote anything."""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Iterator

SECRET_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD")
SHORTEST_SECRET = 8


def secrets() -> Iterator[tuple[str, str]]:
    """Variables of the environment whose names look like secrets, and their values; the longest value first."""
    found = [
        (name, value.strip())
        for name, value in os.environ.items()
        if len(value.strip()) >= SHORTEST_SECRET and any(word in name.upper() for word in SECRET_NAMES)
    ]
    yield from sorted(found, key=lambda one: -len(one[1]))


def masked(text: str) -> str:
    """`text` with `[NAME]` in the place of a secret variable's value, and addresses without their logins."""
    for name, value in secrets():
        text = text.replace(value, f"[{name}]")
    return re.sub(r"://[^/\s@]*@", "://", text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def mask_logs() -> None:
    """From now on, what this process logs where nobody set up logging is masked."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Formatter())


def masked_traceback(error: BaseException) -> str | None:
    """An error's traceback, masked; None if it holds no secret and may be shown as Python shows it."""
    trace = "".join(traceback.format_exception(error))
    said = masked(trace)
    return None if said == trace else said
