"""The logs of a run that goes on: a line for each step that it keeps, once."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from grpo.errors import UserError

log = logging.getLogger(__name__)


def rewind(path: Path, steps: Sequence[int], complete: bool) -> None:
    """Keep the lines of a log for these steps, in order, without one that was cut off.

    A step that has several lines keeps the last one, and steps that have none are missed if the log should be
    `complete`; either is said. Raises UserError for a line that is no record, with nothing changed.
    """
    lines = _lines(path)
    kept = {step: line for step, line in lines if step in steps}
    counts = Counter(step for step, _ in lines if step in steps)
    if doubled := sorted(step for step, count in counts.items() if count > 1):
        log.warning("%s: more than one line for %s; the last line of each is kept", path, _named(doubled))
    if complete and (missing := [step for step in steps if step not in kept]):
        log.warning("%s: no line for %s. Training goes on all the same; reports lack them", path, _named(missing))
    if path.exists():
        replace_text(path, b"".join(kept[step] for step in sorted(kept)).decode())


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """The whole lines of a log, each with its step."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        try:
            step = json.loads(line)["step"]
            if type(step) is not int:
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}:{number}: not a record that grpo wrote; mend or delete it to go on") from None
        found.append((step, line))
    return found


def _named(steps: Iterable[int]) -> str:
    """`steps 3, 5 to 8`."""
    spans = []
    for _, members in groupby(enumerate(steps), lambda placed: placed[1] - placed[0]):
        span = [step for _, step in members]
        spans.append(f"{span[0]}" if len(span) == 1 else f"{span[0]} to {span[-1]}")
    return f"step{'s' if len(spans) > 1 or ' ' in spans[0] else ''} {', '.join(spans)}"


def replace_text(path: Path, text: str) -> None:
    """Write a file so that at every moment it is the old one or the new one."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
