"""The manual's table of architectures, made from what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from measured import Measured
from small import SMALL

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "models.md"
MARKS = "<!-- made by scripts/architectures -->\n", "<!-- as far as here -->\n"
COLUMNS = (
    "model",
    "`model_type`",
    "decoding",
    "prompt shared in sampling",
    "prompt shared in training",
    "LoRA on experts",
    "4 bits",
    "3 bits",
    "export to mlx",
    "to PEFT",
    "fused",
)
JOINED, OWN, CACHES, ROW_BY_ROW = "joined layers", "own layers", "batch caches", "batch caches, row by row"
NOTES = {
    CACHES: "Models with sliding windows, recurrent states or latent attention decode through mlx-lm's batch caches: "
    "each row has a copy of its prompt, and decoding is slower.",
    ROW_BY_ROW: "Soft-capped attention accepts no masks for several rows: rows are decoded one by one, and each "
    "completion trains with its own copy of the prompt.",
    "experts": "mlx-lm keeps a layer's experts in one array; PEFT's models keep them as separate layers, or in another "
    "array. To export to PEFT, leave the experts out of `adapter.targets` (`[self_attn.q_proj, …]`). `--format fused` "
    "exports everything.",
}
"""What there is to say where something is not supported."""

Row = list[str | tuple[str, str]]
"""Cells; one with a note comes with the note's name."""


def table(measured: Mapping[tuple[str, int | None], Measured]) -> str:
    """The table in Markdown, and its notes."""
    rows = [row(name, *(measured[name, bits] for bits in (None, 4, 3))) for name in SMALL]
    named = {cell[1] for cells in rows for cell in cells if isinstance(cell, tuple)}
    numbers = {note: number for number, note in enumerate((note for note in NOTES if note in named), 1)}
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line([_text(cell, numbers) for cell in cells]) for cells in rows]
    return "\n".join([*lines, "", *(f"{number}. {NOTES[note]}" for note, number in numbers.items())]) + "\n"


def row(name: str, whole: Measured, four: Measured, three: Measured) -> Row:
    way = decoding(whole.decoding)
    cells: Row = [name, f"`{SMALL[name]['model_type']}`", way]
    cells.append("yes" if way in (JOINED, OWN) else ("no", way))
    shared = whole.not_shared is None and whole.sharing_gap < 1e-5
    cells.append("yes" if shared else ("no", way))
    cells.append("–" if not whole.has_experts else _said(bool(whole.experts) and not whole.still))
    cells += [_said(quantised.trains) for quantised in (four, three)]
    peft: str | tuple[str, str] = "yes" if whole.no_peft is None else ("no", "experts")
    return [*cells, _said(whole.mlx_gap < 1e-5), peft, _said(whole.fused_gap < 1e-4)]


def decoding(description: str) -> str:
    """The table's word for a way of decoding."""
    if description.startswith("mlx-lm's batch caches"):
        return ROW_BY_ROW if "row by row" in description else CACHES
    return JOINED if description.startswith(JOINED) else OWN


def written() -> str:
    """What the page has between the marks."""
    (found,) = re.findall(f"{MARKS[0]}(.*?){MARKS[1]}", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def write(text: str) -> None:
    """Put it between the marks."""
    begin, end = MARKS
    whole = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(whole.replace(begin + written() + end, begin + text + end), encoding="utf-8")


def _said(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(cell: str | tuple[str, str], numbers: Mapping[str, int]) -> str:
    return cell if isinstance(cell, str) else f"{cell[0]} [{numbers[cell[1]]}]"
