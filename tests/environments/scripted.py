"""A generator whose model says what it is told to say: turns by the token before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from grpo.generation.engine import Engine
from grpo.generation.rows import Kept, Line, Row
from grpo.generation.sampling import Sampling
from grpo.generation.slots import Size
from grpo.generation.stopping import Stopping

VOCABULARY, STOPS = 80, frozenset(range(8))


class Session:
    """Sure of each token: its logprob is 0."""

    overlaps, widest = False, 1

    def __init__(self, script: Mapping[Any, Sequence[Any]], size: Size, vocabulary: int) -> None:
        self.script, self.left, self.vocabulary = script, [iter(())] * size.slots, vocabulary
        self.fed = [0] * size.slots

    def refresh(self) -> None: ...

    def forget(self, prompt) -> None: ...

    def release(self, slot: int) -> None: ...

    def needs_prefill(self, rows) -> bool:
        return True

    def fit(self, size: Size) -> None:
        self.left += [iter(())] * (size.slots - len(self.left))
        self.fed += [0] * (size.slots - len(self.fed))

    def admit(self, slots: Sequence[int], rows: Sequence[Line]) -> None:
        for slot, row in zip(slots, rows, strict=True):
            assert isinstance(row, Row)
            before = [*row.prompt.ids, *row.token_ids][: len(row.prompt.ids) + len(row.token_ids) - len(row.turn)]
            self.left[slot] = iter(self.script[before[-1]][len(row.turn) :])
            self.fed[slot] = len(row.token_ids)

    def take(self, slot: int, most: int) -> Kept:
        return Kept(self.fed[slot], None, 0)

    def keep(self, slots: Sequence[int]) -> None:
        self.left, self.fed = [self.left[i] for i in slots], [self.fed[i] for i in slots]

    def decoded(self) -> mx.array:
        return mx.array(self.fed)

    def logits(self, tokens: mx.array) -> mx.array:
        self.fed = [fed + 1 for fed in self.fed]
        said = mx.array([next(left, 0) for left in self.left])
        return mx.where(mx.arange(self.vocabulary)[None] == said[:, None], 1000.0, 0.0)


class Scripted:
    """What `RolloutEngine` needs of a generator. `script`: the turn that begins after a token."""

    progress = None

    def __init__(self, script: Mapping[int, Sequence[int]], slots: int = 64) -> None:
        self.slots, self.stops = slots, STOPS
        self.tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
        self.decoding = SimpleNamespace(
            vocabulary=VOCABULARY, open=lambda size: Session(script, size, VOCABULARY), close=lambda session: None
        )

    def open(self) -> Engine:
        stream = mx.new_stream(mx.default_device())
        return Engine(lambda: self.decoding, self._rules, self.slots, stream, 1)  # type: ignore[arg-type, return-value]

    def _rules(self, sampling: Sampling) -> Stopping:
        return Stopping(sampling, self.stops, self.tokenizer.decode)
