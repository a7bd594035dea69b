"""A stand-in for the Hub: its HTTP API for models and datasets, as `huggingface_hub` and `datasets` call it."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub.repositories import Repository, files_below, git_oid, is_large, sha256

ROOT = Path(__file__).parents[2]
READER, WRITER, STRANGER = "hf_reader", "hf_writer", "hf_stranger"
"""Tokens: one that may read all, one that may write as well, and one that gated repositories do not know."""


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


@dataclass(frozen=True)
class Request:
    """A request that came in: its line, its token, the range that it asked for, and the answer's status."""

    line: str
    token: str | None
    range: str | None
    status: int


@dataclass(frozen=True)
class Ran:
    """What a command came to."""

    code: int
    out: str
    err: str


class Hub:
    """A Hub on this machine: what is in it, what goes wrong with it, and what it was asked.

        hub.add_model("Qwen/Qwen3-0.6B", folder)        # all files of a folder are the repository; so add_dataset
        hub.failures.append(Failure("GET /cdn/", cut_after=1000, times=1))
        ran = hub.grpo("train", recipe, "optim.steps=1", HF_TOKEN=READER)   # ran.code, ran.out, ran.err
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
        ran = self._process("-c", "from grpo.cli import main; main()", *map(str, args), **more)
        return Ran(ran.returncode, ran.stdout, ran.stderr)

    def several(self, *commands: Sequence[object], **more: str) -> list[Ran]:
        """Run several commands in one process, which is quicker. The first word of one may be `HF_TOKEN=…`."""
        asked = [[str(arg) for arg in args] for args in commands]
        ran = self._process(str(Path(__file__).with_name("several.py")), stdin=json.dumps(asked), **more)
        assert ran.returncode == 0, ran.stderr
        return [Ran(**answer) for answer in json.loads(ran.stdout)]

    def _process(self, *args: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        self.home.mkdir(exist_ok=True)
        where, env = self.home.parent, {**self.environment, **more}
        return subprocess.run(
            [sys.executable, *args], input=stdin, env=env, cwd=where, capture_output=True, text=True, timeout=300
        )

    def start(self) -> None:
        """Listen, at the same address as before."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), _Handler)
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


class Refusal(Exception):
    """An answer other than 200, with the Hub's own words."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    status = 0

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.url = urlsplit(self.path)
        line = f"{self.command} {unquote(self.url.path)}"
        self.failure = self._failure(line)
        try:
            time.sleep(self.failure.delay if self.failure else 0)
            if self.failure and self.failure.status:
                self._answer(self.failure.status, b"", self.failure.headers)
            else:
                self._route(body)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self._answer(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # whoever asked did not wait
        self.hub.requests.append(Request(line, self.token, self.headers.get("Range"), self.status))

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _failure(self, line: str) -> Failure | None:
        with self.hub.lock:
            for failure in self.hub.failures:
                if failure.times != 0 and re.search(failure.request, line):
                    failure.times = failure.times and failure.times - 1
                    return failure
        return None

    def _route(self, body: bytes) -> None:
        if self.token not in (None, READER, WRITER, STRANGER):
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        for methods, pattern, answer in ROUTES:
            if self.command in methods.split() and (found := re.fullmatch(pattern, self.url.path)):
                answer(self, body, **{name: unquote(value or "") for name, value in found.groupdict().items()})
                return
        raise Refusal(404, "", f"Cannot {self.command} {self.url.path}")

    # What can be asked

    def _info(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repository, commit = self._find(kind, name, revision or "main")
        self._json(repository.info(commit))

    def _tree(self, body: bytes, kind: str, name: str, revision: str, path: str) -> None:
        repository, commit = self._find(kind, name, revision)
        recursive = parse_qs(self.url.query).get("recursive", [""])[0].lower() == "true"
        entries = repository.tree(commit, path, recursive)
        if entries is None:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision!r}")
        self._json(entries)

    def _paths_info(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repository, commit = self._find(kind, name, revision)
        paths = parse_qs(body.decode()).get("paths", [])
        there = [path for path in paths if any(f"{one}/".startswith(f"{path}/") for one in repository.commits[commit])]
        self._json([repository.entry(commit, path) for path in there])

    def _resolve(self, body: bytes, name: str, revision: str, path: str, kind: str = "") -> None:
        repository, commit = self._find(kind or "models", name, revision)
        if repository.gated and self.token != READER:
            self._refuse_gated(repository)
        data = repository.commits[commit].get(path)
        if data is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{git_oid(data)}"'}
        if not is_large(path):
            self._content(data, headers)
            return
        digest = sha256(data)
        there = {"Location": f"http://localhost:{self.hub.port}/cdn/{digest}"}  # another host than the API's
        self._answer(302, b"", {**headers, **there, "X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{digest}"'})

    def _auth_check(self, body: bytes, kind: str, name: str) -> None:
        repository, _ = self._find(kind, name, "main")
        if repository.gated and self.token != READER:
            self._refuse_gated(repository)
        self._answer(200, b"", {})

    def _cdn(self, body: bytes, digest: str) -> None:
        data = self.hub.content(digest)
        if data is None or self.token:  # the Hub's token is nobody else's business
            raise Refusal(403, "", "Forbidden")
        self._content(data, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})

    def _whoami(self, body: bytes) -> None:
        if self.token is None:
            raise Refusal(401, "", "Invalid username or password.")
        self._json({"type": "user", "name": self.token.removeprefix("hf_"), "auth": {}, "orgs": []})

    # What can be sent

    def _create(self, body: bytes) -> None:
        self._check_writer()
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'writer'}/{asked['name']}"
        kind = f"{asked.get('type', 'model')}s"
        there = (kind, name) in self.hub.repositories
        if not there:
            repository = self.hub.repositories[kind, name] = Repository(kind, name)
            repository.commit({})
        url = f"{self.hub.endpoint}/{name}"
        self._json(
            {"url": url, "error": "You already created this repo"} if there else {"url": url}, 409 if there else 200
        )

    def _validate(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, kind: str, name: str, revision: str) -> None:
        self._check_writer()
        repository, commit = self._find(kind, name, revision)
        self._json({"files": [self._upload_mode(repository, commit, file) for file in json.loads(body)["files"]]})

    def _upload_mode(self, repository: Repository, commit: str, file: dict[str, Any]) -> dict[str, Any]:
        path = file["path"]
        there = repository.commits[commit].get(path)
        oid = None if there is None else sha256(there) if is_large(path) else git_oid(there)
        mode = "lfs" if is_large(path) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _lfs_batch(self, body: bytes, name: str) -> None:
        self._check_writer()
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, body: bytes, digest: str) -> None:
        if sha256(body) != digest:
            raise Refusal(400, "", "this is not what its digest says")
        self.hub.uploads[digest] = body
        self._answer(200, b"", {"ETag": f'"{digest}"'})

    def _commit(self, body: bytes, kind: str, name: str, revision: str) -> None:
        self._check_writer()
        repository, commit = self._find(kind, name, revision)
        files = dict(repository.commits[commit])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        made = repository.commit(files, revision)
        url = f"{self.hub.endpoint}/{name}/commit/{made}"
        self._json({"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})

    # How it is answered

    def _find(self, kind: str, name: str, revision: str) -> tuple[Repository, str]:
        repository = self.hub.repositories.get((kind, name))
        if repository is None and self.token is None:
            raise Refusal(401, "RepoNotFound", "Invalid username or password.")
        if repository is None:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _refuse_gated(self, repository: Repository) -> None:
        what = f"Access to {repository.kind[:-1]} {repository.name} is restricted"
        if self.token is None:
            why = "You must have access to it and be authenticated to access it. Please log in."
            raise Refusal(401, "GatedRepo", f"{what}. {why}")
        where = f"{self.hub.endpoint}/{repository.name}"
        raise Refusal(
            403, "GatedRepo", f"{what} and you are not in the authorized list. Visit {where} to ask for access."
        )

    def _check_writer(self) -> None:
        if self.token is None:
            raise Refusal(401, "", "Invalid username or password.")
        if self.token != WRITER:
            raise Refusal(403, "", "You don't have the rights to create a model under this namespace")

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        """A file, or the part of it that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self._answer(200, data, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        self._answer(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.status = status
        self.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", "Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.failure and self.failure.cut_after is not None:
            body, self.close_connection = body[: self.failure.cut_after], True
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing; `Hub.requests` has it."""


_NAME = r"(?P<name>[^/]+(?:/[^/]+)?)"
_REPO = rf"(?P<kind>models|datasets)/{_NAME}"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", rf"/api/{_REPO}/auth-check", _Handler._auth_check),
    ("GET", rf"/api/{_REPO}/tree/{_REVISION}(?:/(?P<path>.+))?", _Handler._tree),
    ("POST", rf"/api/{_REPO}/paths-info/{_REVISION}", _Handler._paths_info),
    (
        "GET HEAD",
        rf"/(?:(?P<kind>datasets)/)?{_NAME}/resolve/{_REVISION}/(?P<path>.+)",
        _Handler._resolve,
    ),
    ("GET HEAD", r"/cdn/(?P<digest>\w+)", _Handler._cdn),
    ("GET", r"/api/whoami-v2", _Handler._whoami),
    ("POST", r"/api/repos/create", _Handler._create),
    ("POST", r"/api/validate-yaml", _Handler._validate),
    ("POST", rf"/api/{_REPO}/preupload/{_REVISION}", _Handler._preupload),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT", r"/lfs/(?P<digest>\w+)", _Handler._lfs_upload),
    ("POST", rf"/api/{_REPO}/commit/{_REVISION}", _Handler._commit),
    ("GET", rf"/api/{_REPO}(?:/revision/{_REVISION})?", _Handler._info),
]
