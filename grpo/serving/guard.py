"""Access control: by the API key, and by the host name that a request was sent to."""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass
from typing import Any

from grpo.serving.refusals import Refusal

LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN = ("/health",)
"""Paths that need no key."""


@dataclass(frozen=True, slots=True)
class Guard:
    """Refuses requests with a wrong key or host.

    `key`: clients must send it as `Authorization: Bearer KEY`; None: no key is needed. `hosts`: the accepted names in
    the header Host; None: all. A server on loopback accepts only this machine's own names: otherwise any page in a
    browser could make its own host name resolve to 127.0.0.1, and read the responses (DNS rebinding). `advice` tells a
    client with a wrong key what to do.
    """

    key: str | None = None
    hosts: tuple[str, ...] | None = LOOPBACK
    advice: str = "use the key that the server was started with"

    def around(self, app: Any) -> Any:
        """The ASGI application behind this guard."""

        async def guarded(scope: Any, receive: Any, send: Any) -> None:
            refusal = self.refusal(scope) if scope["type"] == "http" else None
            if refusal is None:
                await app(scope, receive, send)
                return
            body = json.dumps(refusal.body()).encode()
            headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
            encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": int(refusal.status), "headers": encoded})
            await send({"type": "http.response.body", "body": body})

        return guarded

    def refusal(self, scope: Any) -> Refusal | None:
        """Why a request is refused; None if it is accepted."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = _name_of(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts is not None and host not in self.hosts:
            return Refusal(
                403,
                f"this server does not accept the host name {host!r:.100}: use one of {', '.join(self.hosts)}",
                "unknown_host",
            )
        if self.key is None or scope["path"] in OPEN:
            return None
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.key.encode()):
            return None
        why = f"wrong API key: {self.advice}" if given else "an API key is needed: Authorization: Bearer KEY"
        return Refusal(401, why, "invalid_api_key", headers={"www-authenticate": "Bearer"})


def _name_of(host: str) -> str:
    """A host without its port: `[::1]:8000` is `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
