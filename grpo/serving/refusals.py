"""Why a request gets no answer, as HTTP says it and as OpenAI's clients read it."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
"""`type` of the error object, by status; others below 500 are invalid requests, the rest errors of the server."""


class Refusal(Exception):
    """A request that is not answered. `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = HTTPStatus(status), code, param, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object that is answered."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str | None, why: str, code: str | None = None) -> Refusal:
    """The refusal of a request that cannot be answered as it is written."""
    return Refusal(400, f"{param}: {why}" if param else why, code, param)


ENDED = Refusal(503, "the server is shutting down", "shutting_down")
