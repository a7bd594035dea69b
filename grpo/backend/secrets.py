"""Secrets of the environment, kept out of what is printed and stored: an error may quote anything."""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Sequence
from fnmatch import fnmatchcase

SECRETS = (
    "*_KEY",
    "*APIKEY",
    "*_TOKEN",
    "TOKEN",
    "*SECRET*",
    "*PASSWORD*",
    "*PASSWD*",
    "*_PAT",
    "*CREDENTIAL*",
)
"""Names of variables whose values are secrets, in upper or lower case."""
ACCOUNTS = ("AWS_*", "AZURE_*")
"""Names of variables of which some are."""
SHORTEST = 8
"""Characters of the shortest value that is looked for in texts: a shorter one may stand there for itself."""


def is_secret(name: str) -> bool:
    """Whether a variable of this name is taken for a secret, to be kept from other people's code."""
    return _matches(name, (*SECRETS, *ACCOUNTS))


def secrets() -> list[tuple[str, str]]:
    """Variables of the environment that hold secrets, and their values; the longest value first."""
    held = [(name, value.strip()) for name, value in os.environ.items() if _matches(name, SECRETS)]
    return sorted((one for one in held if len(one[1]) >= SHORTEST), key=lambda one: -len(one[1]))


def masked(text: str) -> str:
    """`text` with `[NAME]` in the place of a secret variable's value, and addresses without their logins."""
    for name, value in secrets():
        text = text.replace(value, f"[{name}]")
    return re.sub(r"://[^/\s@]*@", "://", text)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name.upper(), pattern) for pattern in patterns)


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
