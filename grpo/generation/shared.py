"""A session whose rows share the keys and values of their prompts in prefix places; each row has its own columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend.device import on_gpu
from grpo.generation.attention import Attention
from grpo.generation.buffers import PREFILL_TOKENS, CacheShape, KeysValues
from grpo.generation.caches import extended, filled
from grpo.generation.decoders import Decoder
from grpo.generation.prefilling import prefill
from grpo.generation.rows import Computed, Kept, Line, SharedPrompt
from grpo.generation.slots import Size, Slots


class SharedPrefixSession:
    """See `grpo.generation.decoding.Session`.

    A prompt gets a prefix place when its first row enters, and frees it when no more rows will enter. If no place is
    free, a prompt without rows in slots loses its place: it is prefilled again when one of its rows comes back.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        attention: Attention,
        shapes: Sequence[CacheShape],
        extends_together: Callable[[], bool],
        size: Size,
    ) -> None:
        """`extends_together` returns whether several rows may be extended in one batch."""
        self._extends_together = extends_together
        self.overlaps, self.widest = attention.overlaps, attention.widest
        self._model, self._decoder, self._attention = model, decoder, attention
        self._slots = Slots(size)
        self._layers = [shape.layer(size) for shape in shapes]
        self._free = list(range(size.places))
        self._place: dict[SharedPrompt, int] = {}
        self._seated: list[SharedPrompt | None] = [None] * size.slots

    def refresh(self) -> None:
        self._decoder.refresh()

    def needs_prefill(self, rows: Sequence[Line]) -> bool:
        return any(row.token_ids or row.prompt not in self._place for row in rows)

    def fit(self, size: Size) -> None:
        former = self._slots.size
        size = former.covering(size)
        if size == former:
            return
        self._slots.grow(size)
        for layer in self._layers:
            layer.grow(size)
        self._free += range(former.places, size.places)
        self._seated += [None] * (size.slots - former.slots)

    def admit(self, slots: Sequence[int], rows: Sequence[Line]) -> None:
        prompts = dict.fromkeys(row.prompt for row in rows)
        new = [prompt for prompt in prompts if prompt not in self._place]
        for prompt in new:
            self._place[prompt] = self._free_place(prompts)
        self._prefill(new)
        lengths = [len(row.prompt.ids) - 1 for row in rows]
        fed = [len(row.token_ids) for row in rows]
        self._slots.admit(slots, [self._place[row.prompt] for row in rows], lengths, fed)
        for slot, row in zip(slots, rows, strict=True):
            self._seated[slot] = row.prompt
        self._bring([(slot, row) for slot, row in zip(slots, rows, strict=True) if row.token_ids])

    def take(self, slot: int, most: int) -> Kept:
        columns = min(self._slots.own(slot), most)
        state = [layer.take(slot, columns) for layer in self._layers]
        mx.eval(state)
        return Kept(columns, state, _bytes(state))

    def whole(self, slot: int, row: Line) -> Computed:
        columns = min(self._slots.own(slot), len(row.token_ids))
        place, length = self._place[row.prompt], len(row.prompt.ids) - 1
        decoded = [layer.numbers(layer.take(slot, columns)) for layer in self._layers]
        state = [
            _joined(layer.prompt(place, length), numbers) for layer, numbers in zip(self._layers, decoded, strict=True)
        ]
        mx.eval(state)
        ids = (*row.prompt.ids, *row.token_ids)[: length + columns]
        return Computed(ids, state, _bytes(state), type(self), cuts=True)

    def release(self, slot: int) -> None:
        self._seated[slot] = None
        self._slots.vacate(slot)

    def forget(self, prompt: SharedPrompt) -> None:
        if (place := self._place.pop(prompt, None)) is not None:
            self._free.append(place)

    def keep(self, slots: Sequence[int]) -> None:
        places = sorted(self._place.values())
        self._place = {prompt: places.index(place) for prompt, place in self._place.items()}
        self._free = []
        self._seated = [self._seated[slot] for slot in slots]
        self._slots.keep(slots, places)
        kept_slots, kept_places = mx.array(list(slots)), mx.array(places)
        for layer in self._layers:
            layer.keep(kept_slots, kept_places)

    def close(self) -> None:
        self._layers.clear()  # in place, because the frame of an exception may hold the same list
        self._place.clear()

    def decoded(self) -> mx.array:
        return self._slots.decoded()

    def logits(self, tokens: mx.array) -> mx.array:
        logits = self.wide(tokens[:, None])[:, 0]
        self._slots.advance()
        return logits

    def wide(self, tokens: mx.array) -> mx.array:
        return self._decoder.logits(tokens, self._layers, self._attention, self._slots.view(tokens.shape[1]))

    def accept(self, kept: Sequence[int]) -> None:
        self._slots.accept(kept)

    def _free_place(self, entering: dict[SharedPrompt, None]) -> int:
        if self._free:
            return self._free.pop(0)
        idle = next(p for p in self._place if p not in self._seated and p not in entering)
        return self._place.pop(idle)

    def _prefill(self, new: Sequence[SharedPrompt]) -> None:
        """Compute prompts: those with known beginnings one by one, the others in batches."""
        known = {prompt: self._put_known(prompt) for prompt in new}
        for prompt, first in known.items():
            if first:
                prefill(self._model, [prompt.ids], self._layers, [self._place[prompt]], first)
        new = [prompt for prompt, first in known.items() if not first]
        width = max(1, self._slots.size.prefix)
        at_once = max(1, PREFILL_TOKENS // width)
        for start in range(0, len(new), at_once):
            part = new[start : start + at_once]
            prefill(
                self._model, [prompt.ids for prompt in part], self._layers, [self._place[prompt] for prompt in part]
            )

    def _put_known(self, prompt: SharedPrompt) -> int:
        """Write the known beginning of a prompt into its place. Returns the number of its tokens."""
        known = prompt.known
        first = known.usable(prompt.ids) if known is not None and known.by is type(self) else 0
        if known is not None and first:
            place = mx.array([self._place[prompt]])
            for layer, (keys, values) in zip(self._layers, known.state, strict=True):
                layer.insert(place, (keys[:, :, :first], values[:, :, :first]))
        return first

    def _bring(self, entering: Sequence[tuple[int, Line]]) -> None:
        """Write keys and values of rows into their slots: those that were kept, and those computed here."""
        longest = max((len(row.prompt.ids) + len(row.token_ids) for _, row in entering), default=1)
        at_once = max(1, PREFILL_TOKENS // longest)
        for start in range(0, len(entering), at_once):
            part = entering[start : start + at_once]
            pending = [row.pending for _, row in part]
            # On a CPU, the last bits of a row's keys and values would depend on the other rows of the batch.
            together = sum(map(bool, pending)) > 1 and on_gpu() and self._extends_together()
            held = [filled(self._model, self._held(row)) for _, row in part]
            for (slot, row), caches in zip(part, extended(self._model, held, pending, together), strict=True):
                kept = row.kept.fed if row.kept is not None else 0
                first = len(row.prompt.ids) - 1 + kept
                for number, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
                    if row.kept is not None:
                        layer.put_back(slot, row.kept.state[number])
                    keys, values = cache.keys_and_values()
                    if keys.shape[2] > first:
                        layer.put(slot, (keys[:, :, first:], values[:, :, first:]), kept)
            mx.eval([layer.arrays() for layer in self._layers])

    def _held(self, row: Line) -> list[KeysValues]:
        """Keys and values of a row's prompt and of its kept tokens, one pair per layer."""
        place, length = self._place[row.prompt], len(row.prompt.ids) - 1
        prompts = [layer.prompt(place, length) for layer in self._layers]
        if row.kept is None:
            return prompts
        kept = [layer.numbers(taken) for layer, taken in zip(self._layers, row.kept.state, strict=True)]
        return [_joined(prompt, decoded) for prompt, decoded in zip(prompts, kept, strict=True)]


def _joined(first: KeysValues, second: KeysValues) -> KeysValues:
    """Keys and values of some tokens, followed by those of the next tokens."""
    keys, values = (mx.concatenate(list(pair), axis=2) for pair in zip(first, second, strict=True))
    return keys, values


def _bytes(state: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(state))
