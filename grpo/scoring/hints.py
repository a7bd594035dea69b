"""Advice for a reward whose column the dataset has under another name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

SYNONYMS = ("answer", "solution", "gold", "target", "label", "ground_truth", "final_answer", "reference", "expected")
"""Names that datasets and rewards use for the right answer."""


def column_hint(problem: str, columns: Collection[str], source: str | None = None) -> str:
    """A sentence on `data.columns` for "missing a required argument: 'answer'"; empty for other problems.

    It suggests the column in `columns` with a similar name or a synonym, if there is one. `source` is the data source
    with these columns, if there are several sources.
    """
    missing = re.match(r"missing a required argument: '(\w+)'", problem)
    if missing is None or not columns:
        return ""
    wanted = missing[1]
    same = [name for name in SYNONYMS if name in columns] if wanted in SYNONYMS else []
    inside = [name for name in sorted(columns) if wanted in name]
    found = [*same, *inside, *difflib.get_close_matches(wanted, sorted(columns), n=1, cutoff=0.7)]
    renamed = f"columns: {{{wanted}: {found[0] if found else 'THAT_NAME'}}}"
    written = f"data.{renamed}" if source is None else f"{renamed} in the source {source!r}"
    return (
        f" Is it {found[0]}? Write {written}"
        if found
        else f" If the dataset has the column under another name, write {written}"
    )
