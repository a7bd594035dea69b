"""What a generator decodes with. One `Decoding` for a model, one `Session` of it while rows are in flight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol
from weakref import WeakSet

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.device import on_gpu
from grpo.generation.attention import Attention, FusedRowAttention
from grpo.generation.buffers import PREFILL_CHUNK, PREFILL_TOKENS, CacheShape, prefill_chunk
from grpo.generation.caches import extends_together
from grpo.generation.decoders import BlockDecoder, Decoder
from grpo.generation.rows import Computed, Kept, Line, SharedPrompt
from grpo.generation.shared import SharedPrefixSession
from grpo.generation.slots import Size
from grpo.model.logprobs import rounding
from grpo.model.quantized import dtype_of
from grpo.model.tensor import is_divided

SCORES_HELD = 3
"""Copies of attention scores, in fp32, that stock operations hold at once."""

MOST_LANES = 2
"""Sessions that threads step side by side on a CPU (`grpo.generation.lanes`). MLX lets ten tasks of ten operations be
in flight, of all streams together, so more would starve one another."""
LANES_FROM = 64
"""Slots from which on there may be several lanes."""


class Session(Protocol):
    """The rows in flight, S slots of them. A prompt is known by its object."""

    overlaps: bool
    """Whether a step may be launched while the one before it runs."""
    widest: int
    """How many tokens at most a step can feed to each slot: 1 where nothing can be taken back."""

    def refresh(self) -> None:
        """Take over what the model's arrays are now."""
        ...

    def needs_prefill(self, rows: Sequence[Line]) -> bool:
        """Whether admitting these rows changes buffers that a step in flight may read."""
        ...

    def fit(self, size: Size) -> None:
        """Grow to at least this size."""
        ...

    def admit(self, slots: Sequence[int], rows: Sequence[Line]) -> None:
        """Let rows enter slots. They begin from their prompts, or continue from the keys and values that they kept.

        Any other tokens of theirs, except the one to feed next, go through the model here.
        """
        ...

    def take(self, slot: int, most: int) -> Kept:
        """Copy what a slot's row needs to continue later, without what was fed beyond `most` tokens if it can be."""
        ...

    def whole(self, slot: int, row: Line) -> Computed:
        """Copy keys and values of a slot's row and its prompt, without the row's last token if they can be cut."""
        ...

    def release(self, slot: int) -> None:
        """The slot's row has left. Whatever the slot still computes is ignored."""
        ...

    def forget(self, prompt: SharedPrompt) -> None:
        """Free a prompt: no row of it will enter again."""
        ...

    def keep(self, slots: Sequence[int]) -> None:
        """Keep only these slots, renumbered from 0."""
        ...

    def close(self) -> None:
        """Free all buffers, whoever still holds the session: an error's traceback may. Nothing else may follow."""
        ...

    def decoded(self) -> mx.array:
        """How many tokens each row has behind its prompt: `[S]` int32."""
        ...

    def logits(self, tokens: mx.array) -> mx.array:
        """Feed one token to each slot, `[S]`: the logits of the next, `[S, V]`. Goes on to the next step."""
        ...

    def wide(self, tokens: mx.array) -> mx.array:
        """Feed W tokens to each slot, `[S, W]`: the logits of the tokens behind each, `[S, W, V]`.

        W is at most `widest`, and the slots have room for that many. `accept` must follow before anything else changes.
        """
        ...

    def accept(self, kept: Sequence[int]) -> None:
        """Say how many of the tokens that `wide` has fed each slot keeps, and go on to the next step."""
        ...


class Decoding(Protocol):
    """A model, ready to be decoded."""

    vocabulary: int
    description: str
    refused: tuple[str, ...]
    """The faster ways that were tried before this one, each with the reason why it does not serve."""
    narrow: str | None
    """Why a step can feed a row only one token, where that is so (`Session.widest` is 1)."""

    side_by_side: bool
    """Whether sessions may be stepped in several threads at once: nothing that they share changes at a step."""

    lockstep: bool
    """Whether other processes decode the same with the rest of the model, so that nothing may depend on time."""

    def refresh(self) -> None:
        """Take over what the model's arrays are now, computed to the end."""
        ...

    def open(self, size: Size) -> Session:
        """Begin, with so many slots."""
        ...

    def close(self, session: Session) -> None:
        """End a session, and `forget`."""
        ...

    def forget(self) -> None:
        """Hold no weight that trains, and no copy of any, unless a session is open.

        An update may replace such a weight, and the old one would stay in memory beside the new.
        """
        ...

    def memory(self, slots: int, places: int, prompt: int, completion: int, entering: int | None = None) -> int:
        """Bytes that are held to decode so many slots and prompts at once, of at most these lengths in tokens.

        `entering`: what prompts were seen to take besides while they go through the model, if that was tried.
        """
        ...

    def outside(self, prompt: int, completion: int) -> int:
        """Bytes that a row keeps outside its slot, after a prompt and with tokens of its own, so many at most."""
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
        self.narrow = None if attention.widest > 1 else "its attention takes one token of a row at a step"
        self._sessions: WeakSet[Session] = WeakSet()  # a session whose engine was dropped is not open any more
        # The model's own forward pass is patched while it runs, which another thread would see.
        self.lockstep = is_divided(model)
        alone = not attention.overlaps and not on_gpu() and not self.lockstep
        self.side_by_side = isinstance(decoder, BlockDecoder) and alone

    def refresh(self) -> None:
        self.decoder.refresh()
        mx.eval(self.model.parameters())

    def open(self, size: Size) -> Session:
        try:
            self.decoder.refresh()
            session = SharedPrefixSession(
                self.model, self.decoder, self.attention, self.shapes, lambda: self._extends_together, size
            )
        except BaseException:  # no memory for it, say
            self.forget()
            raise
        self._sessions.add(session)
        return session

    def close(self, session: Session) -> None:
        session.close()
        self._sessions.discard(session)
        self.forget()

    @cached_property
    def _extends_together(self) -> bool:
        """Tried when it is first asked for: as a rule rows are not extended."""
        return extends_together(self.model, rounding(dtype_of(self.model)))

    def forget(self) -> None:
        if not self._sessions:
            self.decoder.forget()

    def memory(self, slots: int, places: int, prompt: int, completion: int, entering: int | None = None) -> int:
        token = sum(shape.bytes_per_token for shape in self.shapes)
        if self.side_by_side and slots >= LANES_FROM:  # a prompt may lie in each lane
            places, entering = min(slots, MOST_LANES * places), None if entering else entering
        cached = self.decoder.copied + token * (slots * completion + places * prompt)
        grown = slots * completion * max(shape.at_work for shape in self.shapes)
        entering = self._entering(places, prompt) if entering is None else entering
        return cached + max(entering, grown, self._scores(slots * (prompt + completion)))

    def _entering(self, places: int, prompt: int) -> int:
        """What prompts take while they go through the model: their keys and values as they are computed, and scores."""
        at_once = min(places * prompt, max(prompt, PREFILL_TOKENS))
        numbers = at_once * sum(shape.numbers for shape in self.shapes)
        return numbers + self._scores(at_once * min(prompt, self._chunk))

    def _scores(self, pairs: int) -> int:
        """Of one layer's step, or of a chunk of prompts: stock attention holds them."""
        return 0 if self.attention.overlaps else SCORES_HELD * 4 * self._query_heads * pairs

    @property
    def _chunk(self) -> int:
        """Tokens of a prompt that are prefilled at once, where this decodes: a plan may be for another machine."""
        return PREFILL_CHUNK if isinstance(self.attention, FusedRowAttention) else prefill_chunk()

    def outside(self, prompt: int, completion: int) -> int:  # noqa: ARG002  its prompt's are in a prefix place
        return completion * sum(shape.bytes_per_token for shape in self.shapes)
