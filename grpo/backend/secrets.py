"""Secrets of the environment, kept out of what is printed and stored: an error may quote anything."""

from __future__ import annotations

import json
import logging
import os
import re
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from urllib.parse import quote, quote_plus

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


def _repr_inside_both_quotes(text: str) -> str:
    """`text` as `repr` writes it inside a text that holds both kinds of quotes: each ' has a backslash."""
    return repr("\"'" + text)[4:-1]


def _repr(text: str) -> str:
    """`text` as `repr` writes it inside any other text: no quote has a backslash."""
    return _repr_inside_both_quotes(text).replace("\\'", "'")


ESCAPES: tuple[Callable[[str], str], ...] = (
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    _repr_inside_both_quotes,
    _repr,
    lambda text: quote(text, errors="surrogateescape"),  # a variable may hold bytes that are no text
    lambda text: quote(text, safe="", errors="surrogateescape"),
    lambda text: quote_plus(text, errors="surrogateescape"),
)
"""What writes a text with other characters: JSON, `repr`, and the two ways of web addresses."""


def is_secret(name: str) -> bool:
    """Whether a variable of this name is taken for a secret, to be kept from other people's code."""
    return _matches(name, (*SECRETS, *ACCOUNTS))


def secrets() -> list[tuple[str, str]]:
    """Variables of the environment that hold secrets, and their values; the longest value first.

    A path of this machine is no secret, though its variable is named like one (GOOGLE_APPLICATION_CREDENTIALS,
    PASSWORD_STORE_DIR): it may stand in texts that have nothing to do with it.
    """
    return _held(tuple(os.environ.items()))


@lru_cache(maxsize=1)
def _held(environment: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    held = [(name, value.strip()) for name, value in environment if _matches(name, SECRETS)]
    long = (one for one in held if len(one[1]) >= SHORTEST and not _is_path(one[1]))
    return sorted(long, key=lambda one: -len(one[1]))


def _is_path(value: str) -> bool:
    try:
        return value.startswith("/") and os.path.exists(value)
    except ValueError:  # of no system's
        return False


@lru_cache(maxsize=1)
def _written(held: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """Each secret's name with each way in which a text may write its value; the longest first.

    A value is escaped up to twice: an error's `repr` may itself stand in JSON.
    """
    found: dict[str, str] = {}
    for name, value in held:
        once = {value, *(escape(value) for escape in ESCAPES)}
        twice = {escape(text) for escape in ESCAPES for text in once}
        found |= {text: name for text in sorted({*once, *twice}) if text not in found}
    return sorted(((name, text) for text, name in found.items()), key=lambda one: -len(one[1]))


def masked(text: str) -> str:
    """`text` with `[NAME]` in the place of a secret variable's value, and addresses without their logins.

    A value is also found as JSON, `repr` or a web address writes it.
    """
    for name, value in _written(tuple(secrets())):
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
