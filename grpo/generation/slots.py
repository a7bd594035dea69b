"""Bookkeeping of slots and prefix places, which all layers share, and the arrays that follow from it for one step.

A slot holds a row that is being decoded. A prefix place holds the keys and values of a prompt, which all rows of its
group read. A slot's tokens lie in its own columns: column i has the token i places after the prompt's last token. The
next column follows from the step at which the row started. Keys are rotated before they are stored.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx

from grpo.backend.device import on_gpu

WIDTHS = (2, 4, 8)
"""Numbers of tokens that a wide step can feed each row. Only powers of two, because a GPU needs a trace for each."""
WIDEST = WIDTHS[-1]
"""The largest number of tokens that a step can feed each row."""


def width_step() -> int:
    """Stock operations read a multiple of this many columns.

    On a CPU, each column takes time. The sums are the same whatever the number of columns, because the products have
    few rows (`products.few_rows`); on an Intel processor this holds up to 384 columns, above which MKL sums in parts.
    On a GPU, only 64 was measured.
    """
    return 64 if on_gpu() else 16


@dataclass(frozen=True, slots=True)
class Size:
    """The number of slots, with `columns` columns each, and of prefix places, with `prefix` columns each."""

    slots: int
    places: int
    prefix: int
    columns: int

    def covering(self, other: Size) -> Size:
        """The smallest size that is at least as large as both."""
        return Size(*map(max, astuple(self), astuple(other)))


class Slots:
    """The rows being decoded.

    `starts` and `place_of` have one entry per slot: the step at which its row began, and the row's prefix place.
    `lengths` has one entry per place: the number of tokens of its prompt, without the last, which decoding feeds first.
    A slot whose row has left keeps computing at every step, if necessary in its last column; the results are ignored.
    """

    def __init__(self, size: Size) -> None:
        self.size, self.step = size, 0
        self.lengths = [0] * size.places
        self.starts = [0] * size.slots
        self.place_of = [0] * size.slots
        self._taken: set[int] = set()
        self._device: dict[str, mx.array] = {}
        self._changed()

    def admit(
        self, slots: Sequence[int], places: Sequence[int], lengths: Sequence[int], fed: Sequence[int] | None = None
    ) -> None:
        """Let rows begin in slots at this step, each from a prefix place with a prompt of this length.

        `fed` is the number of columns that each row has filled already; default 0.
        """
        for slot, place, length, filled in zip(slots, places, lengths, fed or [0] * len(slots), strict=True):
            self.starts[slot], self.place_of[slot], self.lengths[place] = self.step - filled, place, length
        self._taken.update(slots)
        self._changed()

    def vacate(self, slot: int) -> None:
        """Mark a slot as empty: its columns need not be read any more."""
        self._taken.discard(slot)

    def own(self, slot: int) -> int:
        """The number of columns that a slot's row has filled."""
        return self.step - self.starts[slot]

    def grow(self, size: Size) -> None:
        """Grow to a size that is at least as large in all dimensions."""
        former, self.size = self.size, size
        self.lengths += [0] * (size.places - former.places)
        self.starts += [self.step] * (size.slots - former.slots)
        self.place_of += [0] * (size.slots - former.slots)
        self._changed()

    def keep(self, kept: Sequence[int], places: Sequence[int]) -> None:
        """Keep only these slots and prefix places, renumbered from 0."""
        renumbered = {place: number for number, place in enumerate(places)}
        self.size = replace(self.size, slots=len(kept), places=len(places))
        self.lengths = [self.lengths[place] for place in places]
        self.starts = [self.starts[slot] for slot in kept]
        self.place_of = [renumbered.get(self.place_of[slot], 0) for slot in kept]
        self._taken = {number for number, slot in enumerate(kept) if slot in self._taken}
        self._changed()

    def advance(self) -> None:
        """Advance to the next step, with one more column filled in every slot."""
        self.step += 1

    def accept(self, kept: Sequence[int]) -> None:
        """Advance to the next step, with `kept[slot]` more columns filled in each slot."""
        self.step += 1
        self.starts = [start + 1 - more for start, more in zip(self.starts, kept, strict=True)]
        self._device["starts"] = mx.array(self.starts, mx.int32)

    def _changed(self) -> None:
        self._layout = Layout(self.place_of, len(self.lengths))
        names = ("lengths", "starts", "place_of")
        self._device = {name: mx.array(getattr(self, name), mx.int32) for name in names}

    def decoded(self) -> mx.array:
        """The number of columns that each slot has filled, `[S]` int32."""
        return self.step - self._device["starts"]

    def view(self, fed: int = 1) -> View:
        """The arrays of a step that feeds `fed` tokens to each slot."""
        filled = {self.own(slot) for slot in self._taken}
        place = self.place_of[0]
        first = RowPlace(place, self.lengths[place], self.own(0))
        return View(self.step, fed, self.size, self._layout, first, filled, **self._device)


class RowPlace(NamedTuple):
    """The place of a row, as host integers: its prefix place, the tokens there, and the columns that it has filled."""

    place: int
    length: int
    decoded: int


class Where(NamedTuple):
    """The arrays that a kernel needs at one step, int32: place_of `[S]`, lengths `[M]`, starts `[S]`, step `[1]`."""

    place_of: mx.array
    lengths: mx.array
    starts: mx.array
    step: mx.array

    @property
    def where(self) -> Where:
        """This object, so that kernels accept a `Where` or a `View`."""
        return self


class View:
    """The arrays that layers need at a step that feeds W tokens to each of S slots.

    `starts` and `place_of` `[S]`, `lengths` `[M]`, int32. Token j of a slot goes into column `decoded` + j, and sees
    the columns up to its own.
    """

    def __init__(
        self,
        step: int,
        fed: int,
        size: Size,
        layout: Layout,
        first_row: RowPlace,
        filled: Collection[int],
        lengths: mx.array,
        starts: mx.array,
        place_of: mx.array,
    ) -> None:
        """`fed` is W; `filled` is the set of the numbers of columns that rows have filled."""
        self.step, self.fed, self.prefix, self.layout = step, fed, size.prefix, layout
        self.lengths, self.starts, self.place_of = lengths, starts, place_of
        self.first_row, self._last = first_row, size.columns - 1
        self.level = next(iter(filled)) if len(filled) == 1 else None
        """The first column that this step fills, if it is the same for all rows; otherwise None."""
        step = width_step()
        self.width = min(size.columns, -(-(max(filled, default=0) + fed) // step) * step)
        """The number of columns that the step reads: what the longest row sees, rounded up."""
        self._rotation: tuple[mx.array, mx.array] | None = None
        self._own: dict[int, mx.array] = {}

    @cached_property
    def where(self) -> Where:
        return Where(self.place_of, self.lengths, self.starts, mx.array([self.step], mx.int32))

    @cached_property
    def decoded(self) -> mx.array:
        """The number of columns that each slot has filled before this step, `[S]`."""
        return self.step - self.starts

    @cached_property
    def positions(self) -> mx.array:
        """The rotary position of each slot's first token in this step, `[S]`."""
        return self.lengths[self.place_of] + self.decoded

    @cached_property
    def columns(self) -> mx.array:
        """The columns for this step's keys and values: `[S, W]`. A slot without a row may be at its last column."""
        return mx.minimum(self.decoded[:, None] + mx.arange(self.fed), self._last)

    def rotation(self, frequencies: mx.array) -> tuple[mx.array, mx.array]:
        """Cosine and sine of each token's rotary angles, `[S, 1, W, rotary / 2]` fp32."""
        if self._rotation is None:
            positions = self.positions[:, None] + mx.arange(self.fed)
            angles = positions[:, None, :, None] * frequencies
            self._rotation = mx.cos(angles), mx.sin(angles)
        return self._rotation

    def own(self, repeats: int) -> mx.array:
        """The mask of the columns that each token sees, each token `repeats` times: `[S, 1, W · repeats, 1, width]`."""
        if repeats not in self._own:
            last = self.decoded[:, None] + mx.arange(self.fed)
            last = mx.repeat(last, repeats, axis=1) if repeats > 1 else last
            self._own[repeats] = (mx.arange(self.width) <= last[:, :, None])[:, None, :, None]
        return self._own[repeats]

    @cached_property
    def prompt(self) -> mx.array:
        """The mask of the prefix columns that each slot's prompt fills: `[S, 1, 1, 1, prefix]`."""
        lengths = self.lengths[self.place_of]
        return (mx.arange(self.prefix)[None] < lengths[:, None])[:, None, None, None]


class Layout:
    """Slots sorted by prefix place into a grid `[M, G]`, so that one product covers a group's rows and their prompt.

    `grid` `[M · G]` is the slot of each cell (0 in empty cells), `cells` `[S]` the cell of each slot. Both are None if
    the slots are in this order already, as when all groups begin together.
    """

    def __init__(self, place_of: Sequence[int], places: int) -> None:
        members: list[list[int]] = [[] for _ in range(places)]
        for slot, place in enumerate(place_of):
            members[place].append(slot)
        self.places = places
        self.rows = max(map(len, members))
        cells = {slot: place * self.rows + i for place, group in enumerate(members) for i, slot in enumerate(group)}
        order = [cells[slot] for slot in range(len(place_of))]
        self.grid: mx.array | None = None
        self.cells: mx.array | None = None
        if order != list(range(self.places * self.rows)):
            padded = [slot for group in members for slot in group + [0] * (self.rows - len(group))]
            self.grid, self.cells = mx.array(padded, mx.int32), mx.array(order, mx.int32)
