"""Worker processes in the sandbox: the files that they may read, and the command that starts them."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.errors import UserError
from grpo.processes.sandbox.cell import HOME, launched, variables
from grpo.processes.sandbox.kernel import is_root
from grpo.processes.sandbox.runner import missing

PACKAGE = Path(__file__).parents[2]
PROCESSES, FILES, DISK = 2048, 1024, 256 << 20
"""Limits: processes and threads of a worker together, open files of each process, and bytes that it may write."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """The read-only folders that a worker in the sandbox sees, in addition to Python."""

    readable: tuple[str, ...]

    @classmethod
    def of(cls, what: str, files: Iterable[Path], others: Iterable[Path] = ()) -> Sandbox:
        """A sandbox that shows the folders of `files`, this package, and Python's imports, but not the home folder.

        Folders of `others` are shown too, if they do not contain the home folder. Raises UserError, which begins with
        `what`, if sandboxes do not work here, and for files that cannot be shown.
        """
        if (why := missing()) is not None:
            raise UserError(
                f"{what}: sandbox: not available here: {why}. `sandbox: false` runs it as you, with access to your "
                "files and your network"
            )
        found = [path.absolute() for path in files]
        for path in found:
            _check(what, path)
        more = [*(Path(entry).absolute() for entry in sys.path), *(path.absolute().parent for path in others)]
        shown = [PACKAGE, *(path.parent for path in found), *(path for path in more if not _holds_home(path))]
        return cls(tuple(dict.fromkeys(str(place) for path in shown for place in (path, path.resolve()))))

    def command(self, arguments: Sequence[str], folder: str) -> list[str]:
        """The command that runs Python with `arguments` in the sandbox, whose root is mounted on the empty `folder`."""
        settings = {
            "unsafe": False,
            "cpu_seconds": None,
            "memory": None,
            "disk": DISK,
            "processes": PROCESSES,
            "files": FILES,
            "readable": self.readable,
        }
        return launched(arguments, folder, settings)

    def environment(self, outside: Mapping[str, str]) -> dict[str, str]:
        """The environment variables `outside`, with the paths of the sandbox."""
        return {**outside, **variables(HOME)}


def _holds_home(folder: Path) -> bool:
    """Whether a folder is the home folder, or contains it."""
    home = Path.home().resolve()
    return folder.resolve() in (home, *home.parents)


def _check(what: str, file: Path) -> None:
    """Raise UserError for a file whose folder must not be shown, or that the sandbox's user cannot read."""
    if _holds_home(file.parent):
        raise UserError(
            f"{what}: sandbox: it would show the folder of {file}, which contains your home folder: move the file to "
            "its own folder"
        )
    for path, needed in ((file.parent, stat.S_IROTH | stat.S_IXOTH), (file, stat.S_IROTH)):
        if is_root() and path.exists() and path.stat().st_mode & needed != needed:
            raise UserError(
                f"{what}: sandbox: you are root, so the sandbox runs as another user, who cannot read {path}: run "
                f"chmod -R o+rX {file.parent}"
            )
