"""Translates TRL's names to grpo's, for errors about a recipe that contains a TRL name.

The tables of the manual's page are the only source, so the page and the messages agree. The page is
`docs/pages/tutorials/migrating-from-trl.md`, and the wheel has a copy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from grpo.plugins import bundled

FOLDER, PAGE = "docs/pages/tutorials", "migrating-from-trl.md"
TRANSLATED, ABSENT = "## Settings", "## What is not here"


@dataclass(frozen=True, slots=True)
class Translation:
    """The page's entry for a TRL name: grpo's keys (empty if grpo has no such setting), and a remark."""

    keys: tuple[str, ...]
    remark: str

    def sentence(self, name: str) -> str:
        """The hint for a recipe with TRL's `name`."""
        if not self.keys:
            return f"TRL's {name} is not a setting here: {self.remark}."
        remark = f" ({self.remark})" if self.remark else ""
        return f"TRL's {name} is {' and '.join(self.keys)} here{remark}."


def answer(name: str) -> Translation | None:
    """The page's entry for a name of TRL, transformers or PEFT; None for any other name."""
    table = answers()
    if name in table:
        return table[name]
    return next((found for pattern, found in table.items() if "*" in pattern and fnmatchcase(name, pattern)), None)


@cache
def answers() -> dict[str, Translation]:
    """The entries of all names in the first column of the page's tables of settings, without `LoraConfig.`."""
    text = (bundled(FOLDER) / PAGE).read_text(encoding="utf-8").partition(TRANSLATED)[2]
    translated, _, absent = text.partition(ABSENT)
    found: dict[str, Translation] = {}
    for part, has_keys in ((translated, True), (absent, False)):
        for line in part.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not line.startswith("| `"):
                continue
            keys = tuple(_ticked(cells[1])) if has_keys else ()
            for name in _ticked(cells[0]):
                found[name.removeprefix("LoraConfig.")] = Translation(keys, cells[-1].replace("`", "").rstrip("."))
    return found


def _ticked(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)
