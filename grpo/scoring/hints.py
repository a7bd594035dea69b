"""What to do about a reward that wants a column which the dataset has under another name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

SYNONYMS = ("answer", "solution", "gold", "target", "label", "ground_truth", "final_answer", "reference", "expected")
"""Names that datasets and rewards have for what is right."""


def column_hint(problem: str, columns: Collection[str]) -> str:
    """A sentence on `data.columns` for "missing a required argument: 'answer'"; nothing for another problem.

    It names the column that is meant, where one of `columns` has a similar name or one that means the same.
    """
    missing = re.match(r"missing a required argument: '(\w+)'", problem)
    if missing is None or not columns:
        return ""
    wanted = missing[1]
    same = [name for name in SYNONYMS if name in columns] if wanted in SYNONYMS else []
    inside = [name for name in sorted(columns) if wanted in name]
    found = [*same, *inside, *difflib.get_close_matches(wanted, sorted(columns), n=1, cutoff=0.7)]
    if found:
        return f" Is it {found[0]}? Write data.columns: {{{wanted}: {found[0]}}}"
    return f" If a column holds it under another name, write data.columns: {{{wanted}: THAT_NAME}}"
