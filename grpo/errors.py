"""The errors that end a command early. The user sees each as one message, without a traceback."""

import difflib
from collections.abc import Iterable
from itertools import takewhile


class UserError(Exception):
    """A mistake in the user's input, such as a recipe, a path or a dataset. Exit code 2."""


class TooLargeError(UserError):
    """The run needs more memory than there is: at least `needed` bytes, which `parts` breaks down if it is known."""

    def __init__(self, message: str, needed: int = 0, parts: dict[str, int] | None = None) -> None:
        super().__init__(message)
        self.needed = needed
        self.parts = parts or {}


class RunError(Exception):
    """The reason why a started run cannot continue. Exit code 1."""


class LostRankError(RunError):
    """Another process of the run was lost. `speaks` is True in one remaining process, which prints the message."""

    def __init__(self, message: str, speaks: bool = True) -> None:
        super().__init__(message)
        self.speaks = speaks


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """` Did you mean 'NAME'?` with the known name that is most similar to `name`, or that begins with it.

    Empty if no name has a similarity of at least `cutoff`, and none begins with `name`.
    """
    known = list(known)
    close = closest(name, known, cutoff) or next((word for word in known if name and word.startswith(name)), None)
    return f" Did you mean {close!r}?" if close else ""


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most similar to `name`; None if no similarity is at least `cutoff`.

    Among equally similar names, the name with the longest common prefix wins, because typos are rare in the first
    letters: "dappo" means "dapo" rather than "dppo".
    """
    close = difflib.get_close_matches(name, known := list(known), n=max(1, len(known)), cutoff=cutoff)

    def similarity(candidate: str) -> tuple[float, int]:
        return difflib.SequenceMatcher(None, candidate, name).ratio(), sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(candidate, name, strict=False))
        )

    return max(close, key=similarity, default=None)
