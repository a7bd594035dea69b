"""What a Hub holds: repositories with their commits, branches and files, as the Hub's API describes them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGE = (".safetensors", ".bin", ".parquet")
"""Endings of files that are kept in git LFS: a download of one is a redirect to another host."""
WRITTEN = "2026-01-01T00:00:00.000Z"

Files = dict[str, bytes]


@dataclass
class Repository:
    """A repository: its commits, each all of its files by path, and the names of some (`main`, tags)."""

    kind: str  # models or datasets
    name: str
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, revision: str = "main") -> str:
        """Make these all of the files at `revision`. Returns the commit."""
        content = [f"{path} {git_oid(data)}" for path, data in sorted(files.items())]
        commit = hashlib.sha1("\n".join([self.name, *content]).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.names[revision] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit means."""
        return self.names.get(revision, revision if revision in self.commits else None)

    def info(self, commit: str) -> dict[str, Any]:
        files = self.commits[commit]
        return {
            "_id": "0" * 24,
            "id": self.name,
            "sha": commit,
            "private": False,
            "gated": "auto" if self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": WRITTEN,
            "createdAt": WRITTEN,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    def tree(self, commit: str, below: str, recursive: bool) -> list[dict[str, Any]] | None:
        """The entries in a folder (`""`: the root), or None where there is no such folder."""
        prefix = f"{below}/" if below else ""
        files = self.commits[commit]
        inside = [path for path in sorted(files) if path.startswith(prefix)]
        if not inside and below:
            return None
        folders = {path[: at + len(prefix)] for path in inside if (at := path[len(prefix) :].find("/")) > 0}
        if recursive:
            folders = {str(parent) for path in inside for parent in Path(path).parents} - {".", below}
        shown = [path for path in inside if recursive or "/" not in path[len(prefix) :]]
        return [self.entry(commit, path) for path in sorted(folders) + shown]

    def entry(self, commit: str, path: str) -> dict[str, Any]:
        """A file or a folder as trees have it."""
        last = {"id": commit, "title": "Upload", "date": WRITTEN}
        data = self.commits[commit].get(path)
        if data is None:
            oid = hashlib.sha1(path.encode()).hexdigest()
            return {"type": "directory", "oid": oid, "size": 0, "path": path, "lastCommit": last}
        entry = {"type": "file", "oid": git_oid(data), "size": len(data), "path": path, "lastCommit": last}
        if is_large(path):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
        return entry


def files_below(folder: Path) -> Files:
    """All files below a folder, by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
