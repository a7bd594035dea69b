"""The two ways in which a command ends early. Both reach the person as one message, without a traceback."""

import difflib
from collections.abc import Iterable
from itertools import takewhile


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


class LostRankError(RunError):
    """Another process of the run was lost. Of those that are left one `speaks`, so that it is said once."""

    def __init__(self, message: str, speaks: bool = True) -> None:
        super().__init__(message)
        self.speaks = speaks


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """` Did you mean 'NAME'?` with the known name that is most similar to `name`, or that begins with it.

    Nothing where no name is similar, from a similarity of `cutoff` on.
    """
    known = list(known)
    close = closest(name, known, cutoff) or next((one for one in known if name and one.startswith(name)), None)
    return f" Did you mean {close!r}?" if close else ""


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most similar to `name`, from a similarity of `cutoff` on; None where there is none.

    Of names that are equally similar it is the one that begins like `name` longest: slips are rare in the first
    letters. So "dappo" is rather "dapo" than "dppo".
    """
    close = difflib.get_close_matches(name, known := list(known), n=max(1, len(known)), cutoff=cutoff)

    def similarity(one: str) -> tuple[float, int]:
        return difflib.SequenceMatcher(None, one, name).ratio(), sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, name, strict=False))
        )

    return max(close, key=similarity, default=None)
