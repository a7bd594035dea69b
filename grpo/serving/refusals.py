"""Refusals: the HTTP status, and the error object that OpenAI's clients read."""

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
"""`type` of the error object by status. Any other status below 500 is an invalid request, from 500 a server error."""


class Refusal(Exception):
    """The reason why a request is not answered. `param` names the wrong field; programs read `code`."""

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
        """The JSON object of the response."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str | None, why: str, code: str | None = None) -> Refusal:
    """The refusal of a request with a mistake: status 400, for the field `param`."""
    return Refusal(400, f"{param}: {why}" if param else why, code, param)


ENDED = Refusal(503, "the server is shutting down", "shutting_down")
