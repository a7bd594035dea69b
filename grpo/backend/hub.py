"""To and from the Hub, with failures that name what could not be had or sent, why, and what to do."""

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
"""Seconds before the Hub is asked again, each time that it says it is busy."""
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
    """What `get` fetches. It is called with True where the Hub does not give it: then the cache is all there is.

    Raises UserError, one line, if that does not have it either: the network, the Hub, what is missing or gated.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its retries are not news: what they come to is
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
            why += "; nor is all of it in the cache (a network is needed once; a folder or a file needs none)"
        raise UserError(f"{repository}: could not be fetched from {constants.ENDPOINT}: {why}") from error
    if trouble is not None and not isinstance(trouble, OfflineModeIsEnabled):
        _warn_once(f"{repository}: taken from the cache: {_why(repository, trouble)}")
    return found


@cache
def _warn_once(text: str) -> None:
    """Warn of what is found anew with every part that is fetched."""
    log.warning(text)


def _ask(repository: Repository) -> None:
    """Ask the Hub for a repository, or raise the reason why it is not to be had. Its libraries' answers are vaguer."""
    from huggingface_hub import HfApi, constants

    api, patience = HfApi(), constants.HF_HUB_DOWNLOAD_TIMEOUT
    info = api.repo_info(repository.name, repo_type=repository.kind, revision=repository.revision, timeout=patience)
    if getattr(info, "gated", False):
        api.auth_check(repository.name, repo_type=repository.kind)


def _http() -> Any:
    """The HTTP library whose errors `huggingface_hub` raises; which one that is depends on its version."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    return httpx


def _patiently(call: Callable[[], Fetched]) -> Fetched:
    """What `call` returns, with a few more tries while the Hub is busy."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            status = _status(_origin(error))
            if status not in BUSY:
                raise
            log.warning("the Hub is busy (%s); asking again in %d s", status, wait)
        time.sleep(wait)
    return call()


def _status(error: BaseException) -> int | None:
    """The Hub's answer, if that is what the error is."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _origin(error: BaseException) -> BaseException:
    """The error of the Hub or the network among those that led to this one; itself if there is none."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) and earlier not in chain:
        chain.append(earlier)
    return next((one for one in chain if isinstance(one, (_http().HTTPError, OfflineModeIsEnabled))), error)


def _why(repository: Repository, error: BaseException) -> str:
    """Why a repository is not to be had, and what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    error = _origin(error)
    if isinstance(error, GatedRepoError) and _status(error) == 401:
        return f"it is gated: accept its terms at {repository.page}, then log in ({LOG_IN})"
    if isinstance(error, GatedRepoError):
        return f"it is gated, and this token's account has no access: ask for it at {repository.page}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no branch, tag or commit {repository.revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no {repository.kind} of that name; a private one needs a token that may read it ({LOG_IN})"
    return {
        401: f"the token was refused: it is wrong or no longer valid ({LOG_IN})",
        403: f"this token may not read it ({LOG_IN})",
        429: f"too many requests from here: wait some minutes, or log in for a higher limit ({LOG_IN})",
    }.get(_status(error) or 0) or _trouble(error)


def _trouble(error: BaseException) -> str:
    """What an error of the Hub, the network or the disk means."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nobody was asked"
    if isinstance(error, _http().TimeoutException):
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
        return f"no answer within {seconds} s (HF_HUB_DOWNLOAD_TIMEOUT={6 * seconds} waits longer)"
    if isinstance(error, (_http().ConnectError, _http().ProxyError)):
        return f"the Hub cannot be reached ({one_line(error)})"
    if isinstance(error, (_http().NetworkError, _http().RemoteProtocolError)):
        return f"the connection broke off, more than once ({one_line(error)}): try again"
    if isinstance(error, JSONDecodeError):
        return "what answers there is no Hub: is it a proxy's page, or HF_ENDPOINT wrong?"
    if status is not None and status >= 500:
        return f"the Hub has trouble of its own ({status}): try again later"
    return _said(error)


def _said(error: BaseException) -> str:
    """The Hub's own words, without the address that they were about, or else the error's."""
    return " ".join((getattr(error, "server_message", None) or "").split())[:300] or one_line(error)


def cached_commit(repository: Repository, file: str) -> str | None:
    """The commit at which a repository is in the cache, if it is; the Hub is not asked.

    `file` is one that has been asked for. If the repository turned out to have no such file, that says its commit, too.
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
    """What `put` answers when it has uploaded. Raises UserError, one line: the network, the token, or a refusal."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        return put()
    except LocalTokenNotFoundError as error:
        why = f"there is no token ({LOG_IN}): {one_line(error)}"
    except (_http().HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = _origin(error)
        why = {
            401: f"there is no token, or a wrong one ({LOG_IN})",
            403: f"this token may not write there: {_said(cause)}",
        }.get(_status(cause) or 0) or _trouble(cause)
    raise UserError(f"{what}: {why}")


def one_line(error: BaseException) -> str:
    """An error's text on one line of bearable length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
