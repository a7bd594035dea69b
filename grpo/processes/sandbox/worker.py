"""Worker processes in the sandbox: what they may read, and how they are started there."""

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
"""Processes and threads of a worker together, open files of each process, and bytes that it may write."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What a worker in the sandbox sees beside Python itself: nothing of it can be written."""

    readable: tuple[str, ...]

    @classmethod
    def of(cls, what: str, files: Iterable[Path], others: Iterable[Path] = ()) -> Sandbox:
        """The folders of `files`, of this package, and those that Python imports from, but for the home folder.

        So are those of `others`, as far as they may be. Raises UserError, which begins with `what`, where there is no
        sandbox, and for files that cannot be shown.
        """
        if (why := missing()) is not None:
            raise UserError(
                f"{what}: sandbox: there is none here: {why}. `sandbox: false` runs it as you, with your files and "
                "your network"
            )
        found = [path.absolute() for path in files]
        for path in found:
            _check(what, path)
        more = [*(Path(entry).absolute() for entry in sys.path), *(path.absolute().parent for path in others)]
        shown = [PACKAGE, *(path.parent for path in found), *(path for path in more if not _holds_home(path))]
        return cls(tuple(dict.fromkeys(str(place) for path in shown for place in (path, path.resolve()))))

    def command(self, arguments: Sequence[str], folder: str) -> list[str]:
        """The command that runs Python with `arguments` in the sandbox, whose root is made on the empty `folder`."""
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
        """The variables of a process outside, with its place in the sandbox."""
        return {**outside, **variables(HOME)}


def _holds_home(folder: Path) -> bool:
    """Whether a folder is the home folder or one above it."""
    home = Path.home().resolve()
    return folder.resolve() in (home, *home.parents)


def _check(what: str, file: Path) -> None:
    """Raises UserError for a file whose folder is not to be shown, or that nobody could read there."""
    if _holds_home(file.parent):
        raise UserError(
            f"{what}: sandbox: it shows the folder of {file}, which holds your home folder: put the file into a folder "
            "of its own"
        )
    for path, needed in ((file.parent, stat.S_IROTH | stat.S_IXOTH), (file, stat.S_IROTH)):
        if is_root() and path.exists() and path.stat().st_mode & needed != needed:
            raise UserError(
                f"{what}: sandbox: started by root, it is run by a user of its own, who may not read {path}: "
                f"chmod -R o+rX {file.parent}"
            )
