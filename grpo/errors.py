"""The two ways in which a command ends early. Both reach the person as one message, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What was asked for cannot be done as written: a recipe, a path, a dataset. Exit code 2."""


class TooLargeError(UserError):
    """It would need more memory than there is: `needed` bytes at least, of which `parts` are the parts, where known."""

    def __init__(self, message: str, needed: int = 0, parts: dict[str, int] | None = None) -> None:
        super().__init__(message)
        self.needed = needed
        self.parts = parts or {}


class RunError(Exception):
    """A run that had started cannot go on, and why. Exit code 1."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'NAME'?` with the known name that is most similar to `name`, or that begins with it.

    Nothing where no name is similar.
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1) or [one for one in known if name and one.startswith(name)]
    return f" Did you mean {close[0]!r}?" if close else ""
