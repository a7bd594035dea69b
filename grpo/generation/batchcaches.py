"""Decoding through mlx-lm's own batch caches, for models that keep more than plain keys and values.

Sliding windows, recurrent state and latent attention have caches that know how to be padded, joined and filtered;
prompts are copied for each row, and joining a row copies what is there. Slower than shared prefixes, but right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.generation.buffers import PREFILL_CHUNK, PREFILL_TOKENS
from grpo.generation.decoding import Session, Work

Caches = list[Any]
"""One of mlx-lm's caches for each layer."""


class BatchCaches:
    """A model by its own forward pass and mlx-lm's batch caches.

    Unless `joined`, rows go through the model one by one: some models (Gemma 2) take no masks of several rows.
    """

    def __init__(
        self, model: nn.Module, vocabulary: int, joined: bool = True, why: str = "", refused: tuple[str, ...] = ()
    ) -> None:
        """`why` says what keeps the model from sharing prompts."""
        self.model = model
        self.vocabulary = vocabulary
        self.joined = joined
        one_by_one = "" if joined else ", row by row"
        self.description = f"mlx-lm's batch caches{one_by_one}{why and f' ({why})'}: slower"
        self.refused = refused

    def open(self, work: Work) -> Session:
        return _BatchCachesSession(self.model, work, self.joined)

    def forget(self) -> None:
        """Nothing to do: no weight is held."""

    def memory(self, slots: int, places: int, prompt: int, completion: int) -> int:
        """From what one row holds at two lengths: each row has its own, and each prompt that waits for its rows."""
        fixed, per_token = self._sizes
        return int((slots + places) * fixed + (slots * (prompt + completion) + places * prompt) * per_token)

    @cached_property
    def _sizes(self) -> tuple[float, float]:
        """Bytes of a row, and more for each of its tokens. Caches grow by 256 columns."""
        short, long = (
            sum(cache.nbytes for cache in _prefilled(self.model, [[0] * (columns + 1)])) for columns in (256, 512)
        )
        return max(0.0, 2 * short - long), max(0.0, (long - short) / 256)


@dataclass(slots=True)
class _Batch:
    """Rows that go through the model together: their caches, and the slot of each."""

    caches: Caches
    slots: list[int]


class _BatchCachesSession:
    overlaps = False

    def __init__(self, model: nn.Module, work: Work, joined: bool) -> None:
        self._model, self._work, self._joined = model, work, joined
        self._padded = not any(map(_recurrent, _empty(model)))
        self._batches: list[_Batch] = []  # one of all rows, or one for each
        self._ready: dict[int, Caches] = {}
        self._waiting = list(work.counts)
        self._starts = [0] * work.slots
        self._step = 0
        self._released: set[int] = set()

    def needs_prefill(self, requests: Sequence[int]) -> bool:
        return any(request not in self._ready for request in requests)

    def admit(self, slots: Sequence[int], requests: Sequence[int]) -> None:
        self._drop_released()
        self._prefill([request for request in dict.fromkeys(requests) if request not in self._ready])
        entering = list(zip(slots, requests, strict=True))
        # Caches that hold nothing yet do not merge with those that do.
        for empty in (False, True):
            self._join([pair for pair in entering if (len(self._work.prompts[pair[1]]) == 1) is empty])
        for slot, request in entering:
            self._starts[slot] = self._step
            self._waiting[request] -= 1
        self._ready = {request: caches for request, caches in self._ready.items() if self._waiting[request]}

    def _join(self, entering: Sequence[tuple[int, int]]) -> None:
        """Append a row for each (slot, request)."""
        for together in [entering] if self._joined else [[pair] for pair in entering]:
            if not together:
                continue
            new = _Batch(_merged([self._ready[request] for _, request in together]), [slot for slot, _ in together])
            if not (self._joined and self._batches):
                self._batches.append(new)
                continue
            (batch,) = self._batches
            for mine, theirs in zip(batch.caches, new.caches, strict=True):
                mine.extend(theirs)
            batch.slots += new.slots

    def release(self, slot: int) -> None:
        self._released.add(slot)

    def keep(self, slots: Sequence[int]) -> None:
        self._drop_released()
        for batch in self._batches:
            batch.slots = [list(slots).index(slot) for slot in batch.slots]
        self._starts = [self._starts[slot] for slot in slots]

    def decoded(self) -> mx.array:
        return self._step - mx.array(self._starts, mx.int32)

    def logits(self, tokens: mx.array) -> mx.array:
        found = mx.concatenate(
            [self._model(tokens[mx.array(b.slots)][:, None], cache=b.caches)[:, -1] for b in self._batches]
        )
        self._step += 1
        row_of = {slot: row for row, slot in enumerate(slot for batch in self._batches for slot in batch.slots)}
        return found[mx.array([row_of.get(slot, 0) for slot in range(len(self._starts))])]

    def _drop_released(self) -> None:
        for batch in self._batches:
            kept = [row for row, slot in enumerate(batch.slots) if slot not in self._released]
            if 0 < len(kept) < len(batch.slots):
                for cache in batch.caches:
                    cache.filter(kept)
            batch.slots = [batch.slots[row] for row in kept]
        self._batches = [batch for batch in self._batches if batch.slots]
        self._released.clear()

    def _prefill(self, requests: Sequence[int]) -> None:
        prompts = self._work.prompts
        self._ready.update({r: _empty(self._model) for r in requests if len(prompts[r]) == 1})
        longer = sorted((r for r in requests if len(prompts[r]) > 1), key=lambda r: len(prompts[r]))
        alike = [longer] if self._padded else [list(group) for _, group in groupby(longer, lambda r: len(prompts[r]))]
        for group in alike:
            at_once = max(1, PREFILL_TOKENS // max((len(prompts[request]) for request in group), default=1))
            at_once = at_once if self._joined else 1
            for start in range(0, len(group), at_once):
                part = group[start : start + at_once]
                caches = _prefilled(self._model, [prompts[request] for request in part])
                for row, request in enumerate(part):
                    self._ready[request] = [cache.extract(row) for cache in caches]


def _recurrent(cache: Any) -> bool:
    """Whether a cache holds a state that padding would run into: not every model masks it."""
    from grpo.model.mlxlm import ArraysCache, CacheList

    if isinstance(cache, CacheList):
        return any(map(_recurrent, cache.caches))
    return isinstance(cache, ArraysCache)


def _empty(model: nn.Module) -> Caches:
    """Caches of one row that hold nothing."""
    from grpo.model.mlxlm import make_prompt_cache

    caches: Caches = make_prompt_cache(model)
    return caches


def _merged(rows: Sequence[Caches]) -> Caches:
    """Caches of one row each as batch caches."""
    return [type(layers[0]).merge(list(layers)) for layers in zip(*rows, strict=True)]


def _prefilled(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Caches:
    """Batch caches of prompts without their last tokens, padded on the right as mlx-lm's caches want to be told."""
    caches = _merged([_empty(model) for _ in prompts])
    lengths = [len(ids) - 1 for ids in prompts]
    width = max(lengths)
    padding = [width - length for length in lengths]
    for cache in caches if max(padding) else ():
        cache.prepare(lengths=lengths, right_padding=padding)
    rows = mx.array([[*ids[:-1], *[0] * (width + 1 - len(ids))] for ids in prompts])
    for start in range(0, width, PREFILL_CHUNK):
        model(rows[:, start : start + PREFILL_CHUNK], cache=caches)
        mx.eval([cache.state for cache in caches])
    for cache in caches if max(padding) else ():
        cache.finalize()
    return caches
