"""A stand-in for the Hub, for the commands that a user runs: what is in it, and what goes wrong with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub.answers import READER, STRANGER, WRITER, Handler, Request
from hub.repositories import Repository, files_below, sha256

__all__ = ["READER", "STRANGER", "WRITER", "Failure", "Hub"]

ROOT = Path(__file__).parents[2]
Ran = subprocess.CompletedProcess[str]


@dataclass
class Failure:
    """What goes wrong with requests whose line matches: `GET /Qwen/Qwen3-0.6B/resolve/main/config.json`.

    `request` is searched in the line as a regular expression. Such a request waits for `delay` seconds; then it is
    answered with `status`, or, without one, as always, but the connection closes after `cut_after` bytes of the body.
    It happens `times` times; None: always. (Large files come from `/cdn/`, as after the redirect.)
    """

    request: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    delay: float = 0.0
    times: int | None = None


class Hub:
    """A Hub on this machine: what is in it, what goes wrong with it, and what it was asked.

        hub.add_model("Qwen/Qwen3-0.6B", folder)        # all files of a folder are the repository; so add_dataset
        hub.failures.append(Failure("GET /cdn/", cut_after=1000, times=1))
        ran = hub.grpo("train", recipe, "optim.steps=1", HF_TOKEN=READER)   # ran.returncode, .stdout, .stderr
        hub.asked("GET .*parquet")                      # what came in

    Commands are processes of their own, because the libraries read `environment` when they are imported: it names this
    Hub, a cache in `home`, and no token. A second command finds what the first one cached, until `forget()`.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.failures: list[Failure] = []
        self.requests: list[Request] = []
        self.uploads: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.port = 0
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """All of a subprocess's environment."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and not name.lower().endswith("_proxy")
        }
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        return {**kept, **ours, "WANDB_MODE": "offline"}

    def add_model(self, name: str, folder: Path, revision: str = "main", gated: bool = False) -> str:
        """Put a folder's files into the model repository `name`, as its new `revision`. Returns the commit."""
        return self._add("models", name, folder, revision, gated)

    def add_dataset(self, name: str, folder: Path, revision: str = "main", gated: bool = False) -> str:
        """Put a folder's files into the dataset repository `name`, as its new `revision`. Returns the commit."""
        return self._add("datasets", name, folder, revision, gated)

    def forget(self) -> None:
        """Empty the cache that `environment` names."""
        shutil.rmtree(self.home, ignore_errors=True)

    def asked(self, pattern: str) -> list[Request]:
        """The requests whose line a regular expression is found in, in their order."""
        return [request for request in self.requests if re.search(pattern, request.line)]

    def grpo(self, *args: object, **more: str) -> Ran:
        """Run `grpo ARGS` as a process in the folder of `home`, with `more` in its environment."""
        return self._process("-c", "from grpo.cli import main; main()", *map(str, args), **more)

    def several(self, *commands: Sequence[object], **more: str) -> list[Ran]:
        """Run several commands in one process, which is quicker. The first word of one may be `HF_TOKEN=…`."""
        asked = [[str(arg) for arg in args] for args in commands]
        ran = self._process(str(Path(__file__).with_name("several.py")), stdin=json.dumps(asked), **more)
        assert ran.returncode == 0, ran.stderr
        return [Ran(words, **answer) for words, answer in zip(asked, json.loads(ran.stdout), strict=True)]

    def _process(self, *args: str, stdin: str = "", **more: str) -> Ran:
        self.home.mkdir(exist_ok=True)
        where, env = self.home.parent, {**self.environment, **more}
        return subprocess.run(
            [sys.executable, *args], input=stdin, env=env, cwd=where, capture_output=True, text=True, timeout=300
        )

    def start(self) -> None:
        """Listen, at the same address as before."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Be gone: connections are refused until `start`."""
        self._server.shutdown()
        self._server.server_close()

    def _add(self, kind: str, name: str, folder: Path, revision: str, gated: bool) -> str:
        repository = self.repositories.setdefault((kind, name), Repository(kind, name))
        repository.gated = gated
        return repository.commit(files_below(folder), revision)

    def content(self, digest: str) -> bytes | None:
        """A large file by its SHA-256."""
        every = [files for one in self.repositories.values() for files in one.commits.values()]
        return next((data for files in every for data in files.values() if sha256(data) == digest), None)
