"""The logs of a resumed run: one line for each step that the run keeps."""

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
    """Keep the lines of a log that belong to these steps, in order. Drops a last line that was cut off.

    If a step has several lines, keeps the last one and warns. If the log should be `complete`, warns about steps
    without a line. Raises UserError, without changing the file, for a line that is not a record.
    """
    lines = _lines(path)
    kept = {step: line for step, line in lines if step in steps}
    counts = Counter(step for step, _ in lines if step in steps)
    if doubled := sorted(step for step, count in counts.items() if count > 1):
        log.warning("%s: more than one line for %s; grpo keeps the last line of each step", path, _named(doubled))
    if complete and (missing := [step for step in steps if step not in kept]):
        log.warning("%s: no line for %s. Training continues; reports will lack these steps", path, _named(missing))
    if path.exists():
        replace_text(path, b"".join(kept[step] for step in sorted(kept)).decode())


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """The complete lines of a log, each with its step."""
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
            raise UserError(f"{path}:{number}: not a record that grpo wrote; fix or delete it to resume") from None
        found.append((step, line))
    return found


def _named(steps: Iterable[int]) -> str:
    """Steps as text, such as `steps 3, 5 to 8`."""
    spans = []
    for _, members in groupby(enumerate(steps), lambda placed: placed[1] - placed[0]):
        span = [step for _, step in members]
        spans.append(f"{span[0]}" if len(span) == 1 else f"{span[0]} to {span[-1]}")
    return f"step{'s' if len(spans) > 1 or ' ' in spans[0] else ''} {', '.join(spans)}"


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: at every moment it has either the old text or the new text."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
