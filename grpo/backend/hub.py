"""Fetching from the Hub, with failures that name what could not be had and from where."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from grpo.errors import UserError

Fetched = TypeVar("Fetched")


def fetch(what: str, get: Callable[[], Fetched]) -> Fetched:
    """What `get` fetches. Raises UserError, one line, when the network or the Hub refuses: away, missing, gated."""
    from huggingface_hub import constants, logging
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its retries are not news; what they come to is said below
    try:
        return get()
    except HFValidationError as error:
        raise UserError(f"{what}: neither a local path nor a name on the Hub: {one_line(error)}") from error
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        raise UserError(f"{what}: could not be fetched from {constants.ENDPOINT}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error's text on one line of bearable length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
