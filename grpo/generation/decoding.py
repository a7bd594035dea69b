"""What a generator decodes with. One `Decoding` for a model, one `Session` of it for each call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from grpo.generation.attention import Attention
from grpo.generation.buffers import PREFILL_CHUNK, PREFILL_TOKENS, CacheShape, prefill
from grpo.generation.decoders import Decoder
from grpo.generation.slots import Slots

SCORES_HELD = 3
"""Copies of attention scores, in fp32, that stock operations hold at once."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a session is to decode: prompts, how many rows of each, through how many slots, to which length."""

    prompts: Sequence[Sequence[int]]
    counts: Sequence[int]
    slots: int
    max_tokens: int


class Session(Protocol):
    """The rows of one call. S slots; requests go by their number in the `Work`."""

    overlaps: bool
    """Whether a step may be launched while the one before it runs."""

    def needs_prefill(self, requests: Sequence[int]) -> bool:
        """Whether admitting rows of these requests changes buffers that a step in flight may read."""
        ...

    def admit(self, slots: Sequence[int], requests: Sequence[int]) -> None:
        """Let a row of each request begin in a slot, from the keys and values of its prompt without the last token."""
        ...

    def release(self, slot: int) -> None:
        """The slot's row has ended. What the slot still computes is not looked at."""
        ...

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all slots but these, which are numbered anew from 0."""
        ...

    def decoded(self) -> mx.array:
        """How many tokens each row has decoded: `[S]` int32."""
        ...

    def logits(self, tokens: mx.array) -> mx.array:
        """Feed one token to each slot, `[S]`: the logits of the next, `[S, V]`. Goes on to the next step."""
        ...


class Decoding(Protocol):
    """A model, ready to be decoded."""

    vocabulary: int
    description: str
    refused: tuple[str, ...]
    """The faster ways that were tried before this one, each with the reason why it does not serve."""

    def open(self, work: Work) -> Session:
        """Begin a call."""
        ...

    def forget(self) -> None:
        """Hold no weight that trains: an update may replace it, and the old one would stay in memory beside the new."""
        ...

    def memory(self, slots: int, places: int, prompt: int, completion: int) -> int:
        """Bytes of keys and values for so many slots and prompts at once, of at most these lengths in tokens."""
        ...


class SharedPrefix:
    """Decoding in which a group's rows share the keys and values of their prompt."""

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        attention: Attention,
        shapes: Sequence[CacheShape],
        vocabulary: int,
        description: str,
        refused: tuple[str, ...] = (),
    ) -> None:
        self.model = model
        self._query_heads = int(getattr(model.args, "num_attention_heads", shapes[0].heads))
        self.decoder, self.attention, self.shapes = decoder, attention, shapes
        self.vocabulary, self.description, self.refused = vocabulary, description, refused

    def open(self, work: Work) -> Session:
        self.decoder.refresh()
        return _SharedPrefixSession(self, work)

    def forget(self) -> None:
        self.decoder.forget()

    def memory(self, slots: int, places: int, prompt: int, completion: int) -> int:
        token = sum(shape.bytes_per_token for shape in self.shapes)
        at_once = min(places * prompt, max(prompt, PREFILL_TOKENS))
        cached = token * (slots * completion + places * prompt + at_once)
        if self.attention.overlaps:
            return cached
        # Stock attention holds its scores: of one layer's step, or of a chunk of prompts.
        scores = max(slots * (prompt + completion), at_once * min(prompt, PREFILL_CHUNK))
        return cached + SCORES_HELD * 4 * self._query_heads * scores


class _SharedPrefixSession:
    """Prefix places are given to requests as their first rows come, and taken back when their last rows have ended."""

    def __init__(self, decoding: SharedPrefix, work: Work) -> None:
        self._decoding, self._work = decoding, work
        self.overlaps = decoding.attention.overlaps
        places = min(len(work.prompts), work.slots)
        prefix = max(map(len, work.prompts)) - 1
        self._slots = Slots(work.slots, places, prefix, work.max_tokens)
        self._layers = [s.layer(places, max(1, prefix), work.slots, work.max_tokens) for s in decoding.shapes]
        self._free = list(range(places))
        self._place: dict[int, int] = {}
        self._left = list(work.counts)
        self._request_in = [-1] * work.slots

    def needs_prefill(self, requests: Sequence[int]) -> bool:
        return any(request not in self._place for request in requests)

    def admit(self, slots: Sequence[int], requests: Sequence[int]) -> None:
        new = [request for request in dict.fromkeys(requests) if request not in self._place]
        for request in new:
            self._place[request] = self._free.pop(0)
        self._prefill(new)
        for slot, request in zip(slots, requests, strict=True):
            self._request_in[slot] = request
        lengths = [len(self._work.prompts[request]) - 1 for request in requests]
        self._slots.admit(slots, [self._place[request] for request in requests], lengths)

    def release(self, slot: int) -> None:
        request = self._request_in[slot]
        self._left[request] -= 1
        if not self._left[request]:
            self._free.append(self._place.pop(request))

    def keep(self, slots: Sequence[int]) -> None:
        places = sorted(self._place.values())
        self._place = {request: places.index(place) for request, place in self._place.items()}
        self._free = []
        self._request_in = [self._request_in[slot] for slot in slots]
        self._slots.keep(slots, places)
        kept, left = mx.array(list(slots)), mx.array(places)
        for layer in self._layers:
            layer.keep(kept, left)
            mx.eval(layer.arrays())  # one layer at a time, so that only one is held twice

    def decoded(self) -> mx.array:
        return self._slots.view().decoded

    def logits(self, tokens: mx.array) -> mx.array:
        decoding = self._decoding
        logits = decoding.decoder.logits(tokens, self._layers, decoding.attention, self._slots.view())
        self._slots.advance()
        return logits

    def _prefill(self, requests: Sequence[int]) -> None:
        width = max(1, self._slots.prefix)
        at_once = max(1, PREFILL_TOKENS // width)
        for start in range(0, len(requests), at_once):
            part = requests[start : start + at_once]
            places = mx.array([self._place[request] for request in part])
            prompts = prefill(self._decoding.model, [self._work.prompts[request] for request in part])
            for layer, keys_values in zip(self._layers, prompts, strict=False):  # one-token prompts have none
                layer.insert(places, keys_values)
            mx.eval([layer.arrays()[:2] for layer in self._layers])
