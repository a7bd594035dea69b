"""Checks whether the Hub answers, and whether the user is logged in to the Hub and W&B. Never prints a login."""

from __future__ import annotations

import netrc
import os
import threading
from pathlib import Path
from urllib.parse import urlsplit

from grpo.backend.hub import one_line
from grpo.doctor.finding import Finding

HUB_SECONDS = 3.0


def hub(endpoint: str | None = None, offline: bool | None = None, seconds: float = HUB_SECONDS) -> Finding:
    """Check whether the Hub (`HF_ENDPOINT`) answers in time, with any status below 500."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE if offline is None else offline:
        return Finding("hub", "ok", "not checked: HF_HUB_OFFLINE is set, so only the cache is used")
    where = endpoint or constants.ENDPOINT
    if (why := _unreachable(where, seconds)) is None:
        return Finding("hub", "ok", f"{where} answers")
    remedy = (
        "check the network and the proxy (HTTPS_PROXY), or set HF_ENDPOINT to a mirror; local folders and the cache "
        "work without the Hub"
    )
    return Finding("hub", "warn", f"{where} cannot be reached: {why}", remedy)


def _unreachable(address: str, seconds: float) -> str | None:
    """Return why an address does not answer; None if it does. Uses a thread, because a name lookup has no timeout."""
    from huggingface_hub import get_session

    said: list[str | None] = []

    def ask() -> None:
        try:
            status = get_session().head(address, timeout=seconds).status_code
            said.append(f"it answers {status}" if status >= 500 else None)
        except Exception as error:  # any exception of the client means that the address does not answer
            said.append(one_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return said[0] if said else f"no answer in {seconds:g} s"


def hub_token(path: Path | None = None) -> Finding:
    """Check whether there is a token for the Hub."""
    from huggingface_hub import constants

    path = path or Path(constants.HF_TOKEN_PATH)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return Finding("hub token", "ok", f"found in {name}")
    if path.is_file() and path.stat().st_size > 0:
        return Finding("hub token", "ok", f"found in {path}")
    text = "none: only gated models and --push-to-hub need a token (`hf auth login`, or HF_TOKEN)"
    return Finding("hub token", "ok", text)


def wandb() -> Finding:
    """Check whether a run with `log.wandb` can be uploaded, as far as this is known without contacting W&B."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return Finding("wandb", "ok", f"WANDB_MODE={mode}: nothing is uploaded")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(name, "").strip():
            return Finding("wandb", "ok", f"logged in with {name}")
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    host = _wandb_host()
    try:
        login = netrc.netrc(path).authenticators(host)
    except FileNotFoundError:
        login = None
    except (netrc.NetrcParseError, OSError) as error:  # do not print the error: it may quote a password
        line = f", line {error.lineno}" if isinstance(error, netrc.NetrcParseError) else ""
        return Finding("wandb", "warn", f"{path}{line}: cannot be read", "fix the file, or set WANDB_API_KEY")
    if login and login[2]:
        return Finding("wandb", "ok", f"logged in to {host} with {path}")
    text = "not logged in (only log.wandb needs it)"
    return Finding("wandb", "warn", text, "run `wandb login`, or set WANDB_MODE=offline")


def _wandb_host() -> str:
    from wandb import Settings

    return urlsplit(os.environ.get("WANDB_BASE_URL") or Settings().base_url).netloc
