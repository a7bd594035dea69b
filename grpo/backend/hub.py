"""To and from the Hub, with failures that name what could not be had or sent, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from grpo.errors import UserError

Fetched = TypeVar("Fetched")

_NO_TOKEN = "no token, or a wrong one (`hf auth login`, or HF_TOKEN)"


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


def send(what: str, put: Callable[[], Fetched]) -> Fetched:
    """What `put` answers when it has uploaded. Raises UserError, one line: the network, the token, or a refusal."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        return put()
    except HfHubHTTPError as error:
        why = _refusal(error.response.status_code) + one_line(error)
    except LocalTokenNotFoundError as error:
        why = f"{_NO_TOKEN}: {one_line(error)}"
    except (httpx.TransportError, ConnectionError) as error:
        why = f"{constants.ENDPOINT} cannot be reached: {one_line(error)}"
    except (HFValidationError, OSError, ValueError) as error:
        why = one_line(error)
    raise UserError(f"{what}: {why}")


def _refusal(status: int) -> str:
    """What an answer of the Hub means, where that is not plain from its text."""
    means = {401: _NO_TOKEN, 403: "this token may not write there"}.get(status, "")
    return f"{means}: " if means else ""


def one_line(error: BaseException) -> str:
    """An error's text on one line of bearable length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
