"""`grpo watch`: the report's page about runs, live, for a browser on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.telemetry.page.data import page_data
from grpo.telemetry.page.text import as_json
from grpo.telemetry.progress import in_words, read_now
from grpo.telemetry.recorded import RecordedRun, RunReader
from grpo.telemetry.report import page

HOST = "127.0.0.1"
"""The loopback: nobody else's machine can connect."""
DATA = "data.json"
RENEW, SHARED = 20.0, 5.0
"""Seconds between two readings of the completions, which take longer than all the rest; and for so many seconds after
one, all answers have them: a page fetches every two seconds, and there may be several pages."""


class LiveRuns:
    """What runs' folders hold at the moment, as the page and its data."""

    def __init__(self, folders: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells seconds. Raises UserError for a folder that is no run's."""
        self._readers, self._clock = [RunReader(folder) for folder in folders], clock
        self._lock = threading.Lock()
        self._completions: list[Any] = []
        self._read = float("-inf")

    def page(self) -> str:
        """The page as it is now, which fetches newer data by itself."""
        with self._lock:
            runs = self._read_runs()
        return page(page_data(runs), DATA)

    def data(self) -> str:
        """The data as it is now, as JSON; with the completions now and then. Raises UserError for records that cannot
        be read."""
        with self._lock:  # several pages would read the same files
            moment = self._clock()
            renew = moment - self._read >= RENEW
            data = page_data(self._read_runs(), completions=renew)
            if renew:
                self._completions, self._read = [run["completions"] for run in data["runs"]], moment
            elif moment - self._read < SHARED:
                for run, completions in zip(data["runs"], self._completions, strict=True):
                    run["completions"] = completions
        for run, reader in zip(data["runs"], self._readers, strict=True):
            if run["state"] == "running" and (now := read_now(reader.folder)) is not None:
                run["now"] = in_words(*now)
        return as_json(data)

    def _read_runs(self) -> list[RecordedRun]:
        return [reader.read() for reader in self._readers]


def is_own_name(host: str | None, port: int) -> bool:
    """Whether a request's `Host` names this server. A browser leaves out port 80."""
    names = (HOST, "localhost")
    return host in {f"{name}:{port}" for name in names} or (port == 80 and host in names)


def server_of(runs: LiveRuns, port: int = 0) -> ThreadingHTTPServer:
    """A server of the page at a port of the loopback, 0: any that is free. It answers nothing but GET and HEAD of the
    page and its data, and nobody who reached it by another name: a page from elsewhere cannot read it.

    Raises UserError where the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "grpo", ""

        def do_GET(self) -> None:
            makers = {"/": (runs.page, "text/html"), f"/{DATA}": (runs.data, "application/json")}
            own = self.connection.getsockname()[1]
            if not is_own_name(self.headers.get("Host"), own):
                way = f"open http://localhost:{own}/; from another machine, through ssh -L {own}:{HOST}:{own} HOST"
                self._answer(403, "text/plain", f"{way}\n")
            elif (found := makers.get(self.path.partition("?")[0])) is None:
                self._answer(404, "text/plain", "there is the page, /, and its data, /data.json\n")
            else:
                make, kind = found
                try:
                    text = make()
                except (UserError, OSError) as error:  # a run that begins anew takes files away
                    self._answer(503, "text/plain", f"{error}\n")
                else:
                    self._answer(200, kind, text)

        do_HEAD = do_GET

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            for name, value in (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")):
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing of requests."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A browser that has left is nobody's error; others show in the answer that is missing."""

    try:
        return Server((HOST, port), Handler)
    except OSError as error:
        raise UserError(
            f"cannot listen at {HOST}:{port}: {error.strerror}; --port names another, --port 0 any that is free"
        ) from None


def watch(folders: Sequence[Path], port: int, tell: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C; `tell` is told where. Raises UserError for what is no run."""
    with server_of(LiveRuns(folders), port) as server:
        tell(f"http://{HOST}:{server.server_port}/  (Ctrl-C ends it; the runs go on)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
