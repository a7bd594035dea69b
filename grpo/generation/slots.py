"""Which row sits where: the bookkeeping that all layers share, and what follows from it for one step.

A slot is a place for a row that is being decoded, a prefix place one for a prompt's keys and values, which all rows
of its group read. What a slot decodes lies in columns of its own: column i has the token i places after the prompt's
last. Which column is next follows from the step at which the row started. Rotary positions are applied before keys
come here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx

from grpo.backend.device import on_gpu

WIDTHS = (2, 4, 8)
"""Tokens that a wide step feeds each row: powers of two, because each is a trace of its own on a GPU."""
WIDEST = WIDTHS[-1]
"""The most tokens of a row that a step feeds."""


def width_step() -> int:
    """Stock operations read a multiple of so many columns.

    A CPU takes time for each of them, and its sums are the same however many it reads, because its products have few
    rows (`products.few_rows`); on an Intel processor that holds up to 384 columns, above which MKL adds up in parts. On
    a GPU only 64 was measured.
    """
    return 64 if on_gpu() else 16


@dataclass(frozen=True, slots=True)
class Size:
    """How many slots with `columns` columns each, and how many prefix places of `prefix` columns."""

    slots: int
    places: int
    prefix: int
    columns: int

    def covering(self, other: Size) -> Size:
        """The smallest size that is at least either."""
        return Size(*map(max, astuple(self), astuple(other)))


class Slots:
    """The rows being decoded.

    `starts` and `place_of` have one entry a slot: the step at which its row began, and the row's prefix place.
    `lengths` has one entry a place: the tokens of the prompt there, without its last, which decoding feeds first.
    A slot whose row has left goes on at every step, in its last column if need be; nobody reads what it computes.
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

        `fed` says how many columns of their own they bring.
        """
        for slot, place, length, own in zip(slots, places, lengths, fed or [0] * len(slots), strict=True):
            self.starts[slot], self.place_of[slot], self.lengths[place] = self.step - own, place, length
        self._taken.update(slots)
        self._changed()

    def vacate(self, slot: int) -> None:
        """The slot's row has left: its columns need not be read any more."""
        self._taken.discard(slot)

    def own(self, slot: int) -> int:
        """How many columns a slot's row has filled."""
        return self.step - self.starts[slot]

    def grow(self, size: Size) -> None:
        """Take another size, larger in every way."""
        former, self.size = self.size, size
        self.lengths += [0] * (size.places - former.places)
        self.starts += [self.step] * (size.slots - former.slots)
        self.place_of += [0] * (size.slots - former.slots)
        self._changed()

    def keep(self, kept: Sequence[int], places: Sequence[int]) -> None:
        """Drop all slots and prefix places but these, which are numbered anew from 0."""
        renumbered = {place: number for number, place in enumerate(places)}
        self.size = replace(self.size, slots=len(kept), places=len(places))
        self.lengths = [self.lengths[place] for place in places]
        self.starts = [self.starts[slot] for slot in kept]
        self.place_of = [renumbered.get(self.place_of[slot], 0) for slot in kept]
        self._taken = {number for number, slot in enumerate(kept) if slot in self._taken}
        self._changed()

    def advance(self) -> None:
        """Go on to the next step, with one more column filled in every slot."""
        self.step += 1

    def accept(self, kept: Sequence[int]) -> None:
        """Go on to the next step, with so many more columns filled in each slot."""
        self.step += 1
        self.starts = [start + 1 - more for start, more in zip(self.starts, kept, strict=True)]
        self._device["starts"] = mx.array(self.starts, mx.int32)

    def _changed(self) -> None:
        self._layout = Layout(self.place_of, len(self.lengths))
        names = ("lengths", "starts", "place_of")
        self._device = {name: mx.array(getattr(self, name), mx.int32) for name in names}

    def decoded(self) -> mx.array:
        """How many columns each slot has filled, `[S]` int32."""
        return self.step - self._device["starts"]

    def view(self, fed: int = 1) -> View:
        """The arrays of a step that feeds so many tokens to each slot."""
        filled = {self.own(slot) for slot in self._taken}
        place = self.place_of[0]
        first = RowPlace(place, self.lengths[place], self.own(0))
        return View(self.step, fed, self.size, self._layout, first, filled, **self._device)


class RowPlace(NamedTuple):
    """Where a row is, as the host knows it: its prefix place, the tokens there, and the columns it has filled."""

    place: int
    length: int
    decoded: int


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
    """What the layers need to know at a step that feeds W tokens to each of S slots.

    `starts` and `place_of` `[S]`, `lengths` `[M]`, int32. Token j of a slot goes into the column behind the `decoded`
    that the slot has filled and the j before it, and sees the columns up to its own.
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
        """`fed` is W; `filled` has the numbers of columns that rows in slots have filled."""
        self.step, self.fed, self.prefix, self.layout = step, fed, size.prefix, layout
        self.lengths, self.starts, self.place_of = lengths, starts, place_of
        self.first_row, self._last = first_row, size.columns - 1
        self.level = next(iter(filled)) if len(filled) == 1 else None
        """The first column that this step fills, where all rows fill the same."""
        step = width_step()
        self.width = min(size.columns, -(-(max(filled, default=0) + fed) // step) * step)
        """How many columns rows see at most, rounded up."""
        self._rotation: tuple[mx.array, mx.array] | None = None
        self._own: dict[int, mx.array] = {}

    @cached_property
    def where(self) -> Where:
        return Where(self.place_of, self.lengths, self.starts, mx.array([self.step], mx.int32))

    @cached_property
    def decoded(self) -> mx.array:
        """How many columns each slot has filled before this step."""
        return self.step - self.starts

    @cached_property
    def positions(self) -> mx.array:
        """The rotary position of each slot's first token of this step."""
        return self.lengths[self.place_of] + self.decoded

    @cached_property
    def columns(self) -> mx.array:
        """Where this step's keys and values go: `[S, W]`. A slot whose row has left may be at its end."""
        return mx.minimum(self.decoded[:, None] + mx.arange(self.fed), self._last)

    def rotation(self, frequencies: mx.array) -> tuple[mx.array, mx.array]:
        """Cosine and sine of each token's rotary angles, `[S, 1, W, rotary / 2]` fp32."""
        if self._rotation is None:
            positions = self.positions[:, None] + mx.arange(self.fed)
            angles = positions[:, None, :, None] * frequencies
            self._rotation = mx.cos(angles), mx.sin(angles)
        return self._rotation

    def own(self, repeats: int) -> mx.array:
        """Which columns each token sees, each token so many times in turn: `[S, 1, W · repeats, 1, width]`."""
        if repeats not in self._own:
            last = self.decoded[:, None] + mx.arange(self.fed)
            last = mx.repeat(last, repeats, axis=1) if repeats > 1 else last
            self._own[repeats] = (mx.arange(self.width) <= last[:, :, None])[:, None, :, None]
        return self._own[repeats]

    @cached_property
    def prompt(self) -> mx.array:
        """Which columns of its prefix place the prompt of each slot fills: `[S, 1, 1, 1, prefix]`."""
        lengths = self.lengths[self.place_of]
        return (mx.arange(self.prefix)[None] < lengths[:, None])[:, None, None, None]


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
