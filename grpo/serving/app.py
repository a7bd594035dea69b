"""The endpoints over HTTP, as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from grpo.serving.guard import Guard
from grpo.serving.refusals import Refusal
from grpo.serving.service import Answerable, Service, ServingLimits
from grpo.serving.sessions import SessionMemory, session_id
from grpo.serving.wire import ChatRequest, CompletionRequest, GenerateRequest, OpenAIFields, read

log = logging.getLogger("grpo")
Endpoint = Callable[[Request], Coroutine[Any, Any, Any]]
ENDPOINTS = (
    "the endpoints are GET /health, /v1/models and /v1/models/NAME, and POST /v1/chat/completions, /v1/completions and "
    "/inference/v1/generate"
)
GONE = 499
"""Status of the response for a client that has disconnected: no client reads it."""
GRACE = 30.0
"""Seconds that a client may take to read a stream, in addition to the time limit of a response."""


def application(service: Service, guard: Guard) -> Any:
    """The ASGI application. Every error is answered with a JSON object in OpenAI's form."""

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        service.close()

    async def models(_: Request) -> Any:
        return JSONResponse(service.models())

    async def model(request: Request) -> Any:
        return JSONResponse(service.model(request.path_params["name"]))

    async def health(_: Request) -> Any:
        return JSONResponse(service.health())

    async def chat(request: Request) -> Any:
        return await _openai(service, request, ChatRequest, service.chat)

    async def completions(request: Request) -> Any:
        return await _openai(service, request, CompletionRequest, service.completion)

    async def generate(request: Request) -> Any:
        session = _session(service, request)
        asked = read(GenerateRequest, await _body(request, service.limits))
        return JSONResponse(await _while_there(request, service.generate(asked, session)))

    asking = [
        Route("/v1/models", _answering(models)),
        Route("/v1/models/{name:path}", _answering(model)),
        Route("/v1/chat/completions", _answering(chat), methods=["POST"]),
        Route("/v1/completions", _answering(completions), methods=["POST"]),
        Route("/inference/v1/generate", _answering(generate), methods=["POST"]),
    ]
    routes = [Route("/health", _answering(health)), *asking, Mount("/s/{session}", routes=asking)]
    return guard.around(Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _unknown}))


async def _openai(
    service: Service,
    request: Request,
    kind: type[Any],
    prepare: Callable[[Any, SessionMemory | None], Awaitable[Answerable]],
) -> Any:
    session = _session(service, request)
    asked: OpenAIFields = read(kind, await _body(request, service.limits))
    prepared = await prepare(asked, session)
    if not asked.stream:
        return JSONResponse(await _while_there(request, service.whole(prepared)))
    return await _stream(service, request, prepared)


def _session(service: Service, request: Request) -> SessionMemory | None:
    """The session that a request belongs to. Raises Refusal."""
    return service.session(session_id(request.path_params.get("session"), request.headers.getlist("x-session-id")))


async def _stream(service: Service, request: Request, prepared: Answerable) -> Any:
    """The response, after its first tokens exist: an error before that still gets its own HTTP status."""
    async with AsyncExitStack() as opened:
        exchange = opened.enter_context(service.begun(prepared.asks))
        events = service.events(prepared, exchange)
        first = await _while_there(request, anext(events))  # type: ignore[arg-type]
        return _Streamed(first, events, opened.pop_all(), service.limits.seconds + GRACE)


class _Streamed:
    """A stream of server-sent events. Closes `opened` when the stream ends, whatever the reason."""

    def __init__(self, first: bytes, events: AsyncIterator[bytes], opened: AsyncExitStack, seconds: float) -> None:
        self._first, self._events, self._opened, self._seconds = first, events, opened, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        response = StreamingResponse(self._all(), media_type="text/event-stream", headers=headers)
        async with self._opened:
            with suppress(TimeoutError, ClientDisconnect):
                async with asyncio.timeout(self._seconds):
                    await response(scope, receive, send)

    async def _all(self) -> AsyncIterator[bytes]:
        yield self._first
        async for event in self._events:
            if event:
                yield event


def _answering(endpoint: Endpoint) -> Endpoint:
    """The endpoint, with every exception turned into a response."""

    async def answer(request: Request) -> Any:
        try:
            return await endpoint(request)
        except Refusal as refusal:
            return _refused(refusal)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except Exception as error:  # our own error: only the log gets the details
            log.exception("a request failed")
            return _refused(Refusal(500, f"the server failed: {type(error).__name__} (see the server's log)"))

    return answer


def _refused(refusal: Refusal) -> Any:
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


async def _unknown(_: Request, error: Any) -> Any:
    headers = error.headers or {}
    return _refused(Refusal(error.status_code, f"{error.detail}; {ENDPOINTS}", headers=headers))


async def _body(request: Request, limits: ServingLimits) -> bytes:
    """The request's body. Raises Refusal if its header does not say JSON, if it is too long, or if it is too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "the body must be JSON, with the header Content-Type: application/json")
    found = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                found += chunk
                if len(found) > limits.body_bytes:
                    raise Refusal(413, f"the body is too large: the limit is {limits.body_bytes:,} bytes")
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {limits.body_seconds:g} seconds") from None
    return bytes(found)


async def _while_there(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of the work. Raises ClientDisconnect, and cancels the work, when the client disconnects."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
