"""Which row sits where: the bookkeeping that all layers share, and what follows from it for one step.

A slot is a place for a row that is being decoded, a prefix place one for a prompt's keys and values, which all rows
of its group read. A slot writes what it decodes into a ring of columns. All slots write the same column at a step,
whatever their rows' lengths, so that a write is one slice of a buffer; which columns are a row's own follows from the
step at which it started. Rotary positions are applied before keys come here, so where a key lies does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx

WIDTH_STEP = 64
"""Stock operations read the ring in multiples of this many columns."""


@dataclass(frozen=True, slots=True)
class Size:
    """How many slots with rings of `ring` columns, and how many prefix places of `prefix` columns."""

    slots: int
    places: int
    prefix: int
    ring: int

    def covering(self, other: Size) -> Size:
        """The smallest size that is at least either."""
        return Size(*map(max, astuple(self), astuple(other)))


class Slots:
    """The rows being decoded.

    `starts` and `place_of` have one entry a slot: the step at which its row began, and the row's prefix place.
    `lengths` has one entry a place: the tokens of the prompt there, without its last, which decoding feeds first.
    """

    def __init__(self, size: Size) -> None:
        self.size, self.step = size, 0
        self.lengths = [0] * size.places
        self.starts = [0] * size.slots
        self.place_of = [0] * size.slots
        self._device: dict[str, mx.array] = {}
        self._changed()

    def admit(
        self, slots: Sequence[int], places: Sequence[int], lengths: Sequence[int], fed: Sequence[int] | None = None
    ) -> None:
        """Let rows begin in slots at this step, each from a prefix place with a prompt of this length.

        `fed` says how many columns of their own they bring: those before this step's, for which there is room.
        """
        for slot, place, length, own in zip(slots, places, lengths, fed or [0] * len(slots), strict=True):
            self.starts[slot], self.place_of[slot], self.lengths[place] = self.step - own, place, length
        self._changed()

    def own(self, slot: int) -> list[slice]:
        """Where a slot's row has its columns in the ring, before this step's: one part, or two around its end."""
        count, first = self.step - self.starts[slot], self.starts[slot] % self.size.ring
        behind = first + count - self.size.ring
        return [slice(first, first + count)] if behind <= 0 else [slice(first, self.size.ring), slice(0, behind)]

    def grow(self, size: Size) -> list[int] | None:
        """Take another size, larger in every way: where the ring's columns come from, oldest first.

        None if they stay where they are. A longer ring begins with what the former one held.
        """
        former, self.size = self.size, size
        self.lengths += [0] * (size.places - former.places)
        self.starts += [self.step] * (size.slots - former.slots)
        self.place_of += [0] * (size.slots - former.slots)
        order = None
        if size.ring > former.ring and self.step > former.ring:
            order = [column % former.ring for column in range(self.step - former.ring, self.step)]
            self.starts = [max(0, start - self.step + former.ring) for start in self.starts]
            self.step = former.ring
        self._changed()
        return order

    def make_room(self, fed: int, whole: bool) -> list[int] | None:
        """Let there be so many columns before this step's: where the ring's columns come from then.

        None if they stay where they are. Steps are counted on, by `whole` rounds of the ring if need be. Otherwise a
        ring that is not full yet is moved, so that stock operations need not read all of it from now on.
        """
        ring, more = self.size.ring, fed - self.step
        if more <= 0:
            return None
        step = -(-fed // WIDTH_STEP) * WIDTH_STEP
        whole = whole or self.step >= ring or step >= ring
        more = -(-more // ring) * ring if whole else step - self.step
        self.step += more
        self.starts = [start + more for start in self.starts]
        return None if whole else [(column - more) % ring for column in range(ring)]

    def keep(self, kept: Sequence[int], places: Sequence[int]) -> None:
        """Drop all slots and prefix places but these, which are numbered anew from 0."""
        renumbered = {place: number for number, place in enumerate(places)}
        self.size = replace(self.size, slots=len(kept), places=len(places))
        self.lengths = [self.lengths[place] for place in places]
        self.starts = [self.starts[slot] for slot in kept]
        self.place_of = [renumbered.get(self.place_of[slot], 0) for slot in kept]
        self._changed()

    def advance(self) -> None:
        """Go on to the next step."""
        self.step += 1

    def _changed(self) -> None:
        self._layout = Layout(self.place_of, len(self.lengths))
        names = ("lengths", "starts", "place_of")
        self._device = {name: mx.array(getattr(self, name), mx.int32) for name in names}

    def _first_row(self) -> RowPlace:
        place = self.place_of[0]
        return RowPlace(place, self.lengths[place], self.starts[0])

    def view(self) -> View:
        """This step's arrays."""
        return View(self.step, self.size.prefix, self.size.ring, self._layout, self._first_row(), **self._device)


class RowPlace(NamedTuple):
    """Where one row is, as the host knows it: its prefix place, the tokens there, and the step at which it began."""

    place: int
    length: int
    start: int


class Where(NamedTuple):
    """What a kernel needs to know at one step, int32: place_of `[S]`, lengths `[M]`, starts `[S]`, step `[1]`."""

    place_of: mx.array
    lengths: mx.array
    starts: mx.array
    step: mx.array

    @property
    def where(self) -> Where:
        """Itself, so that kernels take it as they take a `View`."""
        return self


class View:
    """What the layers need to know at one step: `starts` and `place_of` `[S]`, `lengths` `[M]`, int32."""

    def __init__(
        self,
        step: int,
        prefix: int,
        ring: int,
        layout: Layout,
        first_row: RowPlace,
        lengths: mx.array,
        starts: mx.array,
        place_of: mx.array,
    ) -> None:
        self.step, self.prefix, self.ring, self.layout = step, prefix, ring, layout
        self.lengths, self.starts, self.place_of = lengths, starts, place_of
        self.first_row = first_row
        self.column = step % ring
        """Of the ring, where this step's keys and values go."""
        self.width = min(ring, -(-(step + 1) // WIDTH_STEP) * WIDTH_STEP)
        """Columns of the ring that hold anything yet, rounded up."""
        self._rotation: tuple[mx.array, mx.array] | None = None

    @cached_property
    def where(self) -> Where:
        return Where(self.place_of, self.lengths, self.starts, mx.array([self.step], mx.int32))

    @cached_property
    def decoded(self) -> mx.array:
        """How many tokens each row has decoded before this step."""
        return self.step - self.starts

    @cached_property
    def positions(self) -> mx.array:
        """The rotary position of each row's token."""
        return self.lengths[self.place_of] + self.decoded

    def rotation(self, frequencies: mx.array) -> tuple[mx.array, mx.array]:
        """Cosine and sine of each row's rotary angles, `[S, 1, 1, rotary / 2]` fp32."""
        if self._rotation is None:
            angles = self.positions[:, None, None, None] * frequencies
            self._rotation = mx.cos(angles), mx.sin(angles)
        return self._rotation

    @cached_property
    def own(self) -> mx.array:
        """Which columns of the ring are a row's own, this step's included: `[S, 1, 1, width]`."""
        age = (self.step - mx.arange(self.width)) % self.ring
        return (age[None] <= self.decoded[:, None])[:, None, None]

    @cached_property
    def prompt(self) -> mx.array:
        """Which columns of a prefix place its prompt fills: `[M, 1, 1, prefix]`."""
        return (mx.arange(self.prefix)[None] < self.lengths[:, None])[:, None, None]


class Layout:
    """Slots sorted by prefix place into a grid `[M, G]`, so that a group's rows meet their prompt in one product.

    `grid` `[M · G]` is a slot for each cell (0 in cells that stay empty), `cells` `[S]` the cell of each slot. Both are
    None where the slots lie in that order already, as they do when all groups began together.
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
