"""Downloads from and uploads to the Hub. Errors name the repository, the reason, and what to do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from json import JSONDecodeError
from pathlib import Path
from typing import Any, Literal, TypeVar

from grpo.errors import UserError

log = logging.getLogger(__name__)

Fetched = TypeVar("Fetched")

WAITS = (1, 2, 4)
"""Seconds before each retry if the Hub is busy."""
BUSY = (429, 500, 502, 503, 504)
LOG_IN = "`hf auth login`, or HF_TOKEN"


@dataclass(frozen=True, slots=True)
class Repository:
    """A model or a dataset on the Hub, at a branch, tag or commit."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{'model' if self.kind == 'model' else 'data'} {self.name}"

    @property
    def page(self) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'' if self.kind == 'model' else 'datasets/'}{self.name}"


def fetch(repository: Repository, get: Callable[[bool], Fetched]) -> Fetched:
    """The result of `get`, which downloads. If the Hub fails, `get(True)` must use only the cache.

    Raises UserError, one line, if the cache fails, too. The message says why: the network, the Hub, a missing or gated
    repository.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # hides its retries; grpo reports the outcome
    trouble: Exception | None = None
    try:
        _patiently(lambda: _ask(repository))
    except HFValidationError as error:
        raise UserError(f"{repository}: neither a local path nor a name on the Hub: {one_line(error)}") from error
    except (_http().HTTPError, OSError, ValueError) as error:
        trouble = error
    try:
        found = _patiently(lambda: get(trouble is not None))
    except (_http().HTTPError, OSError, RuntimeError) as error:
        why = _why(repository, trouble or error)
        if trouble is not None and _status(trouble) is None:
            why += "; and the cache has no complete copy (the first download needs a network; a local path does not)"
        raise UserError(f"{repository}: cannot be downloaded from {constants.ENDPOINT}: {why}") from error
    if trouble is not None and not isinstance(trouble, OfflineModeIsEnabled):
        _warn_once(f"{repository}: using the copy in the cache: {_why(repository, trouble)}")
    return found


@cache
def _warn_once(text: str) -> None:
    """Log a warning once, because every downloaded part meets the same problem."""
    log.warning(text)


def _ask(repository: Repository) -> None:
    """Ask the Hub about a repository, and raise if it is not available. Errors of a download are less specific."""
    from huggingface_hub import HfApi, constants

    api, patience = HfApi(), constants.HF_HUB_DOWNLOAD_TIMEOUT
    info = api.repo_info(repository.name, repo_type=repository.kind, revision=repository.revision, timeout=patience)
    if getattr(info, "gated", False):
        api.auth_check(repository.name, repo_type=repository.kind)


def _http() -> Any:
    """The HTTP library whose errors `huggingface_hub` raises, which depends on its version."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    return httpx


def _patiently(call: Callable[[], Fetched]) -> Fetched:
    """The result of `call`, with a few retries while the Hub is busy."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            status = _status(_origin(error))
            if status not in BUSY:
                raise
            log.warning("the Hub is busy (%s); retrying in %d s", status, wait)
        time.sleep(wait)
    return call()


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error that is an answer of the Hub; None for other errors."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _origin(error: BaseException) -> BaseException:
    """The error of the Hub or the network among the causes of this error; the error itself if there is none."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) and earlier not in chain:
        chain.append(earlier)
    return next((link for link in chain if isinstance(link, (_http().HTTPError, OfflineModeIsEnabled))), error)


def _why(repository: Repository, error: BaseException) -> str:
    """Why a repository is not available, and what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    error = _origin(error)
    if isinstance(error, GatedRepoError) and _status(error) == 401:
        return f"it is gated: accept its terms at {repository.page}, then log in ({LOG_IN})"
    if isinstance(error, GatedRepoError):
        return f"it is gated, and this token's account has no access: request access at {repository.page}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no branch, tag or commit {repository.revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no {repository.kind} with this name; a private {repository.kind} needs a token with read access "
            f"({LOG_IN})"
        )
    return {
        401: f"the Hub refused the token: it is wrong or has expired ({LOG_IN})",
        403: f"this token has no read access ({LOG_IN})",
        429: f"too many requests from this address: wait some minutes, or log in for a higher limit ({LOG_IN})",
    }.get(_status(error) or 0) or _trouble(error)


def _trouble(error: BaseException) -> str:
    """A plain explanation of an error of the Hub, the network or the disk."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub was not asked"
    if isinstance(error, _http().TimeoutException):
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        return f"no answer within {seconds} s (HF_HUB_DOWNLOAD_TIMEOUT={6 * seconds} waits longer)"
    if isinstance(error, (_http().ConnectError, _http().ProxyError)):
        return f"the Hub cannot be reached ({one_line(error)})"
    if isinstance(error, (_http().NetworkError, _http().RemoteProtocolError)):
        return f"the connection broke several times ({one_line(error)}): try again"
    if isinstance(error, JSONDecodeError):
        return "the server that answered is not a Hub: check HF_ENDPOINT, and whether a proxy answers instead"
    if status is not None and status >= 500:
        return f"the Hub has an internal error ({status}): try again later"
    return _message(error)


def _message(error: BaseException) -> str:
    """The Hub's message without the request's address, or else the error's text."""
    return " ".join((getattr(error, "server_message", None) or "").split())[:300] or one_line(error)


def cached_commit(repository: Repository, file: str) -> str | None:
    """The commit of a repository in the cache; None if it is not cached. Does not ask the Hub.

    `file` is a file that has been requested before. The cache has the commit even if the repository has no such file.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    kind, revision = repository.kind, repository.revision
    found: object = try_to_load_from_cache(repository.name, file, revision=revision, repo_type=kind)
    if found is None:
        return None
    if isinstance(found, str):
        return Path(found).parent.name
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository.name, repo_type=kind))
    named = folder / "refs" / (revision or "main")
    return named.read_text(encoding="utf-8").strip() if named.is_file() else revision


def send(what: str, put: Callable[[], Fetched]) -> Fetched:
    """The result of `put`, which uploads. Raises UserError, one line: the network, the token, or a refusal."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        return put()
    except LocalTokenNotFoundError as error:
        why = f"no token found ({LOG_IN}): {one_line(error)}"
    except (_http().HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = _origin(error)
        why = {
            401: f"the token is missing or wrong ({LOG_IN})",
            403: f"this token has no write access: {_message(cause)}",
        }.get(_status(cause) or 0) or _trouble(cause)
    raise UserError(f"{what}: {why}")


def one_line(error: BaseException) -> str:
    """An error's text on one line, at most 300 characters; the error's type if it has no text."""
    return " ".join(str(error).split())[:300] or type(error).__name__
