"""A session on mlx-lm's batch caches: the caches of all rows, joined so that the rows decode together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn

from grpo.generation.buffers import PREFILL_TOKENS
from grpo.generation.caches import Caches, copy_states, empty, extended, is_plain, is_recurrent, merged, prefilled
from grpo.generation.rows import Computed, Kept, Line, SharedPrompt
from grpo.generation.slots import Size


@dataclass(slots=True)
class _Batch:
    """Rows that go through the model together: their caches, and the slot of each."""

    caches: Caches
    slots: list[int]


class BatchCachesSession:
    """See `grpo.generation.decoding.Session`."""

    overlaps = False
    widest = 1  # recurrent states and sliding windows cannot take tokens back

    def __init__(self, model: nn.Module, slots: int, joined: bool) -> None:
        self._model, self._joined = model, joined
        self._padded = not any(map(is_recurrent, empty(model)))
        self._extended_together = joined and all(map(is_plain, empty(model)))
        self._batches: list[_Batch] = []  # one for all rows, or one per row
        self._ready: dict[SharedPrompt | Line, Caches] = {}
        self._starts = [0] * slots
        self._step = 0
        self._released: set[int] = set()

    def refresh(self) -> None:
        """Nothing to do: the session uses the model's own arrays."""

    def needs_prefill(self, rows: Sequence[Line]) -> bool:
        return any(row.token_ids or row.prompt not in self._ready for row in rows)

    def fit(self, size: Size) -> None:
        self._starts += [self._step] * (size.slots - len(self._starts))

    def admit(self, slots: Sequence[int], rows: Sequence[Line]) -> None:
        self._drop_released()
        # A prompt of one token has no keys and values to start from: its rows are prefilled together with their tokens.
        whole = [row for row in rows if row.kept is None and len(row.prompt.ids) == 1]
        missing: dict[SharedPrompt | Line, Sequence[int]] = {
            _source(row): [*row.prompt.ids, *row.token_ids] for row in whole
        }
        missing |= {row.prompt: row.prompt.ids for row in rows if row.kept is None and row not in whole}
        missing = {source: ids for source, ids in missing.items() if source not in self._ready}
        self._continue_known(missing)
        self._prefill({source: ids for source, ids in missing.items() if source not in self._ready})
        self._extend([row for row in rows if row.kept or (row.token_ids and row not in whole)])
        entering = [(slot, self._ready[_source(row)]) for slot, row in zip(slots, rows, strict=True)]
        # Empty caches do not merge with filled caches.
        alone = [len(row.prompt.ids) == 1 and not row.token_ids for row in rows]
        for nothing in (False, True):
            self._join([pair for pair, is_empty in zip(entering, alone, strict=True) if is_empty is nothing])
        for slot, row in zip(slots, rows, strict=True):
            self._starts[slot] = self._step - len(row.token_ids)
            row.prompt.unstarted -= not row.begun
            self._ready.pop(row, None)
            if not row.prompt.unstarted:
                self._ready.pop(row.prompt, None)

    def take(self, slot: int, most: int) -> Kept:  # noqa: ARG002  these caches cannot be cut
        batch, row = next((b, b.slots.index(slot)) for b in self._batches if slot in b.slots)
        caches = [cache.extract(row) for cache in batch.caches]
        for cache in caches:
            copy_states(cache)
        mx.eval([cache.state for cache in caches])
        return Kept(self._step - self._starts[slot], caches, sum(cache.nbytes for cache in caches))

    def whole(self, slot: int, row: Line) -> Computed:
        kept = self.take(slot, len(row.token_ids))
        ids = (*row.prompt.ids, *row.token_ids)[: len(row.prompt.ids) - 1 + kept.fed]
        return Computed(ids, kept.state, kept.nbytes, type(self), cuts=False)

    def release(self, slot: int) -> None:
        self._released.add(slot)
        if all(other in self._released for batch in self._batches for other in batch.slots):
            self._drop_released()

    def forget(self, prompt: SharedPrompt) -> None:
        self._ready.pop(prompt, None)

    def _continue_known(self, sources: Iterable[SharedPrompt | Line]) -> None:
        """Start prompts from the caches of known beginnings, and feed the remaining tokens."""
        for prompt in sources:
            if not isinstance(prompt, SharedPrompt) or (known := prompt.known) is None or known.by is not type(self):
                continue
            if first := known.usable(prompt.ids):
                pending = prompt.ids[first:-1]
                (self._ready[prompt],) = extended(self._model, [deepcopy(known.state)], [pending], together=False)

    def _extend(self, rows: Sequence[Line]) -> None:
        """Feed the tokens of rows that are not yet in the row's cache, or in the prompt's."""
        kept = [row.kept.state if row.kept else deepcopy(self._ready[row.prompt]) for row in rows]
        found = extended(self._model, kept, [row.pending for row in rows], self._extended_together)
        self._ready.update(zip(rows, found, strict=True))

    def _join(self, entering: Sequence[tuple[int, Caches]]) -> None:
        """Add rows, each with its slot and its caches, to the batch."""
        for together in [entering] if self._joined else [[pair] for pair in entering]:
            if not together:
                continue
            new = _Batch(merged([caches for _, caches in together]), [slot for slot, _ in together])
            if not (self._joined and self._batches):
                self._batches.append(new)
                continue
            (batch,) = self._batches
            for cache, added in zip(batch.caches, new.caches, strict=True):
                cache.extend(added)
            batch.slots += new.slots

    def keep(self, slots: Sequence[int]) -> None:
        self._drop_released()
        for batch in self._batches:
            batch.slots = [list(slots).index(slot) for slot in batch.slots]
        self._starts = [self._starts[slot] for slot in slots]

    def close(self) -> None:
        self._batches.clear()
        self._ready.clear()

    def decoded(self) -> mx.array:
        return self._step - mx.array(self._starts, mx.int32)

    def logits(self, tokens: mx.array) -> mx.array:
        found = mx.concatenate(
            [self._model(tokens[mx.array(b.slots)][:, None], cache=b.caches)[:, -1] for b in self._batches]
        )
        self._step += 1
        row_of = {slot: row for row, slot in enumerate(slot for batch in self._batches for slot in batch.slots)}
        return found[mx.array([row_of.get(slot, 0) for slot in range(len(self._starts))])]

    def wide(self, tokens: mx.array) -> mx.array:
        raise NotImplementedError("mlx-lm's batch caches cannot take tokens back, so a step feeds each row one token")

    def accept(self, kept: Sequence[int]) -> None:
        raise NotImplementedError("mlx-lm's batch caches cannot take tokens back")

    def _drop_released(self) -> None:
        for batch in self._batches:
            kept = [row for row, slot in enumerate(batch.slots) if slot not in self._released]
            if 0 < len(kept) < len(batch.slots):
                for cache in batch.caches:
                    cache.filter(kept)
            batch.slots = [batch.slots[row] for row in kept]
        self._batches = [batch for batch in self._batches if batch.slots]
        self._released.clear()

    def _prefill(self, sequences: Mapping[SharedPrompt | Line, Sequence[int]]) -> None:
        self._ready.update({source: empty(self._model) for source, ids in sequences.items() if len(ids) == 1})
        longer = sorted((item for item in sequences.items() if len(item[1]) > 1), key=_length)
        alike = [longer] if self._padded else [list(group) for _, group in groupby(longer, _length)]
        for group in alike:
            at_once = max(1, PREFILL_TOKENS // max(map(_length, group), default=1))
            at_once = at_once if self._joined else 1
            for start in range(0, len(group), at_once):
                part = group[start : start + at_once]
                caches = prefilled(self._model, [ids for _, ids in part])
                for row, (source, _) in enumerate(part):
                    self._ready[source] = [cache.extract(row) for cache in caches]


def _source(row: Line) -> SharedPrompt | Line:
    """The owner of the keys and values that a row enters with: its prompt, or the row itself if it has tokens."""
    return row if row.token_ids else row.prompt


def _length(item: tuple[SharedPrompt | Line, Sequence[int]]) -> int:
    return len(item[1])
