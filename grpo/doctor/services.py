"""The Hub and Weights & Biases: can they be reached, and is somebody logged in? What the login is, is never said."""

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
    """Whether the Hub (`HF_ENDPOINT`) answers in time. Anything that it answers will do."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE if offline is None else offline:
        return Finding("hub", "ok", "not asked: HF_HUB_OFFLINE is set, so only what is in the cache is found")
    where = endpoint or constants.ENDPOINT
    if (why := _unreachable(where, seconds)) is None:
        return Finding("hub", "ok", f"{where} answers")
    remedy = (
        "see to network and proxy (HTTPS_PROXY), or name a mirror by HF_ENDPOINT; folders and the cache need no Hub"
    )
    return Finding("hub", "warn", f"{where} cannot be reached: {why}", remedy)


def _unreachable(address: str, seconds: float) -> str | None:
    """Why an address does not answer; None if it does. No timeout holds for looking up a name, so a thread does it."""
    from huggingface_hub import get_session

    said: list[str | None] = []

    def ask() -> None:
        try:
            status = get_session().head(address, timeout=seconds).status_code
            said.append(f"it answers {status}" if status >= 500 else None)
        except Exception as error:  # whatever the client raises, the answer is no
            said.append(one_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return said[0] if said else f"no answer in {seconds:g} s"


def hub_token(path: Path | None = None) -> Finding:
    """Whether there is a token for the Hub."""
    from huggingface_hub import constants

    path = path or Path(constants.HF_TOKEN_PATH)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return Finding("hub token", "ok", f"there is one, in {name}")
    if path.is_file() and path.stat().st_size > 0:
        return Finding("hub token", "ok", f"there is one, in {path}")
    text = "none: only gated models and --push-to-hub want one (`hf auth login`, or HF_TOKEN)"
    return Finding("hub token", "ok", text)


def wandb() -> Finding:
    """Whether a run with `log.wandb` could be sent, as far as can be told without asking W&B."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return Finding("wandb", "ok", f"WANDB_MODE={mode}: nothing is sent")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(name, "").strip():
            return Finding("wandb", "ok", f"logged in, by {name}")
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    host = _wandb_host()
    try:
        login = netrc.netrc(path).authenticators(host)
    except FileNotFoundError:
        login = None
    except (netrc.NetrcParseError, OSError) as error:  # its text may quote a password
        line = f", line {error.lineno}" if isinstance(error, netrc.NetrcParseError) else ""
        return Finding("wandb", "warn", f"{path}{line}: cannot be read", "mend it, or set WANDB_API_KEY")
    if login and login[2]:
        return Finding("wandb", "ok", f"logged in to {host}, by {path}")
    return Finding("wandb", "warn", "not logged in, which only log.wandb wants", "`wandb login`, or WANDB_MODE=offline")


def _wandb_host() -> str:
    from wandb import Settings

    return urlsplit(os.environ.get("WANDB_BASE_URL") or Settings().base_url).netloc
