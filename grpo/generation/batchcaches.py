"""Decoding through mlx-lm's own batch caches, for models that keep more than plain keys and values.

Sliding windows, recurrent state and latent attention have caches that know how to be padded, joined and filtered;
prompts are copied for each row, and joining a row copies what is there. Slower than shared prefixes, but right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.generation.buffers import PREFILL_CHUNK, PREFILL_TOKENS
from grpo.generation.decoding import Session, Work

Caches = list[Any]
"""One of mlx-lm's caches for each layer."""


class BatchCaches:
    """A model by its own forward pass and mlx-lm's batch caches."""

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.description = "mlx-lm's batch caches (this architecture keeps more than plain keys and values): slower"

    def open(self, work: Work) -> Session:
        return _BatchCachesSession(self.model, work)

    def memory(self, slots: int, places: int, prompt: int, completion: int) -> int:
        """Found by caching one row of these lengths, less what 256 columns of rounding add; every row has its own."""
        del places
        caches = _prefilled(self.model, [[0] * 2])
        per_token = sum(cache.nbytes for cache in caches) / 256
        return int(slots * (prompt + completion) * per_token)


class _BatchCachesSession:
    overlaps = False

    def __init__(self, model: nn.Module, work: Work) -> None:
        self._model, self._work = model, work
        self._caches: Caches = []
        self._rows: list[int] = []  # the slot of each row of the caches
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
        """Append a row for each (slot, request) to the caches."""
        if not entering:
            return
        rows = [self._ready[request] for _, request in entering]
        joined = _merged(rows)
        for mine, theirs in zip(self._caches, joined, strict=False):
            mine.extend(theirs)
        self._caches = self._caches or joined
        self._rows += [slot for slot, _ in entering]

    def release(self, slot: int) -> None:
        self._released.add(slot)

    def keep(self, slots: Sequence[int]) -> None:
        self._drop_released()
        self._rows = [list(slots).index(slot) for slot in self._rows]
        self._starts = [self._starts[slot] for slot in slots]

    def decoded(self) -> mx.array:
        return self._step - mx.array(self._starts, mx.int32)

    def logits(self, tokens: mx.array) -> mx.array:
        found: mx.array = self._model(tokens[mx.array(self._rows)][:, None], cache=self._caches)[:, -1]
        self._step += 1
        row_of = {slot: row for row, slot in enumerate(self._rows)}
        return found[mx.array([row_of.get(slot, 0) for slot in range(len(self._starts))])]

    def _drop_released(self) -> None:
        kept = [row for row, slot in enumerate(self._rows) if slot not in self._released]
        if len(kept) < len(self._rows):
            for cache in self._caches if kept else ():
                cache.filter(kept)
            self._caches = self._caches if kept else []
            self._rows = [self._rows[row] for row in kept]
        self._released.clear()

    def _prefill(self, requests: Sequence[int]) -> None:
        prompts = self._work.prompts
        self._ready.update({r: _empty(self._model) for r in requests if len(prompts[r]) == 1})
        longer = [request for request in requests if len(prompts[request]) > 1]
        at_once = max(1, PREFILL_TOKENS // max((len(prompts[request]) for request in longer), default=1))
        for start in range(0, len(longer), at_once):
            part = longer[start : start + at_once]
            caches = _prefilled(self._model, [prompts[request] for request in part])
            for row, request in enumerate(part):
                self._ready[request] = [cache.extract(row) for cache in caches]


def _empty(model: nn.Module) -> Caches:
    """Caches of one row that hold nothing."""
    from mlx_lm.models.cache import make_prompt_cache

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
