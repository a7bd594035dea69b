"""`grpo watch`: serves the report's page about runs, live, to a browser on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.runs.folder import check_is_run
from grpo.telemetry.page.data import page_data
from grpo.telemetry.page.text import as_json
from grpo.telemetry.progress import in_words, read_now
from grpo.telemetry.recorded import read_run
from grpo.telemetry.report import page

HOST = "127.0.0.1"
"""The loopback address: other machines cannot connect."""
DATA = "data.json"
RENEW, SHARED = 20.0, 5.0
"""`RENEW`: seconds between two reads of the completions, which take longer than the other data. `SHARED`: for this many
seconds after a read, every response contains the completions, because several pages may fetch, each every two
seconds."""


class LiveRuns:
    """The current content of runs' folders, as the page and as its data."""

    def __init__(self, folders: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns the time in seconds. Raises UserError for a folder that is not a run."""
        for folder in folders:
            check_is_run(folder)
        self._folders, self._clock = folders, clock
        self._lock = threading.Lock()
        self._completions: list[Any] = []
        self._read = float("-inf")

    def page(self) -> str:
        """The page with the current data. It fetches newer data by itself."""
        return page(page_data([read_run(folder) for folder in self._folders]), DATA)

    def data(self) -> str:
        """The current data as JSON; some responses contain the completions (see `RENEW`). Raises UserError for records
        that cannot be read."""
        with self._lock:  # several pages would read the same files at the same time
            moment = self._clock()
            renew = moment - self._read >= RENEW
            data = page_data([read_run(folder) for folder in self._folders], completions=renew)
            if renew:
                self._completions, self._read = [run["completions"] for run in data["runs"]], moment
            elif moment - self._read < SHARED:
                for run, completions in zip(data["runs"], self._completions, strict=True):
                    run["completions"] = completions
        for run, folder in zip(data["runs"], self._folders, strict=True):
            if run["state"] == "running" and (now := read_now(folder)) is not None:
                run["now"] = in_words(*now)
        return as_json(data)


def server_of(runs: LiveRuns, port: int = 0) -> ThreadingHTTPServer:
    """A server of the page on a loopback port (0: any free port).

    It answers only GET and HEAD requests for the page and its data, and refuses requests with another Host header, so
    that a web page from another site cannot read the data (DNS rebinding).

    Raises UserError if the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "grpo", ""

        def do_GET(self) -> None:
            makers = {"/": (runs.page, "text/html"), f"/{DATA}": (runs.data, "application/json")}
            port = self.connection.getsockname()[1]
            if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
                advice = f"open http://localhost:{port}/; from another machine, use ssh -L {port}:{HOST}:{port} HOST"
                self._answer(403, "text/plain", f"{advice}\n")
            elif (found := makers.get(self.path.partition("?")[0])) is None:
                self._answer(404, "text/plain", "not found: this server has the page, /, and its data, /data.json\n")
            else:
                make, kind = found
                try:
                    text = make()
                except (UserError, OSError) as error:  # a run that starts over removes files
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
            """Do not log requests."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Ignore errors: most are browsers that closed the connection, and others show as a missing response."""

    try:
        return Server((HOST, port), Handler)
    except OSError as error:
        raise UserError(
            f"cannot listen at {HOST}:{port}: {error.strerror}. Choose another port: --port N, or --port 0 for any "
            "free port"
        ) from None


def watch(folders: Sequence[Path], port: int, tell: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C; `tell` gets a line with the address. Raises UserError for a folder that is not a
    run."""
    with server_of(LiveRuns(folders), port) as server:
        tell(f"http://{HOST}:{server.server_port}/  (Ctrl-C stops the server; the runs continue)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
