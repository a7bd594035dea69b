"""Masks secrets of the environment in printed and stored text, because an error message may quote anything."""

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
"""Patterns for names of variables whose values are secrets. Upper and lower case match alike."""
ACCOUNTS = ("AWS_*", "AZURE_*")
"""Patterns for names of variables that may be secrets: hidden from other people's code, but not masked in texts."""
SHORTEST = 8
"""Characters of the shortest value to mask: a shorter value may occur in a text by coincidence."""


def _repr_inside_both_quotes(text: str) -> str:
    """`text` as `repr` writes it inside a text with both kinds of quotes: each ' has a backslash."""
    return repr("\"'" + text)[4:-1]


def _repr(text: str) -> str:
    """`text` as `repr` writes it inside any other text: no quote has a backslash."""
    return _repr_inside_both_quotes(text).replace("\\'", "'")


ESCAPES: tuple[Callable[[str], str], ...] = (
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    _repr_inside_both_quotes,
    _repr,
    lambda text: quote(text, errors="surrogateescape"),  # a variable may hold bytes that are not text
    lambda text: quote(text, safe="", errors="surrogateescape"),
    lambda text: quote_plus(text, errors="surrogateescape"),
)
"""Functions that escape a text: as in JSON, in `repr`, and in URLs (in two ways)."""


def is_secret(name: str) -> bool:
    """Whether a variable with this name counts as a secret, and is hidden from other people's code."""
    return _matches(name, (*SECRETS, *ACCOUNTS))


def secrets() -> list[tuple[str, str]]:
    """Names and values of secret environment variables, the longest value first.

    An existing path is not a secret, even if its variable has a secret's name (GOOGLE_APPLICATION_CREDENTIALS,
    PASSWORD_STORE_DIR), because unrelated texts may contain it.
    """
    return _held(tuple(os.environ.items()))


@lru_cache(maxsize=1)
def _held(environment: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    held = [(name, value.strip()) for name, value in environment if _matches(name, SECRETS)]
    long = (pair for pair in held if len(pair[1]) >= SHORTEST and not _is_path(pair[1]))
    return sorted(long, key=lambda pair: -len(pair[1]))


def _is_path(value: str) -> bool:
    try:
        return value.startswith("/") and os.path.exists(value)
    except ValueError:  # no system allows such a path
        return False


@lru_cache(maxsize=1)
def _written(held: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    """Each secret's name with every escaped form of its value, the longest form first.

    A value may be escaped twice: JSON may contain an error's `repr`.
    """
    found: dict[str, str] = {}
    for name, value in held:
        once = {value, *(escape(value) for escape in ESCAPES)}
        twice = {escape(text) for escape in ESCAPES for text in once}
        found |= {text: name for text in sorted({*once, *twice}) if text not in found}
    return sorted(((name, text) for text, name in found.items()), key=lambda pair: -len(pair[1]))


def masked(text: str) -> str:
    """`text` with `[NAME]` instead of a secret variable's value, and with logins removed from URLs.

    Values are also found in the form in which JSON, `repr` or a URL writes them.
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
    """Mask the log messages of this process from now on, unless somebody has set up logging."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Formatter())


def masked_traceback(error: BaseException) -> str | None:
    """An error's traceback, masked; None if it contains no secret, so that Python can print it as usual."""
    trace = "".join(traceback.format_exception(error))
    shown = masked(trace)
    return None if shown == trace else shown
