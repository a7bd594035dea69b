"""The interface between the generator and a model: one `Decoding` per model, one `Session` while rows are in flight."""

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
"""Number of copies of the attention scores, in fp32, that stock operations hold simultaneously."""

MOST_LANES = 2
"""Largest number of sessions that threads step in parallel on a CPU (`grpo.generation.lanes`). MLX allows ten tasks of
ten operations in flight over all streams, so more lanes would starve each other."""
LANES_FROM = 64
"""Smallest number of slots for several lanes."""


class Session(Protocol):
    """The rows in flight, in S slots. Two prompts are the same only if they are the same object."""

    overlaps: bool
    """Whether a step may be launched while the previous step runs."""
    widest: int
    """The largest number of tokens that a step can feed each slot: 1 if tokens cannot be taken back."""

    def refresh(self) -> None:
        """Read the model's arrays again: they may have been replaced."""
        ...

    def needs_prefill(self, rows: Sequence[Line]) -> bool:
        """Whether admitting these rows changes buffers that a step in flight may read."""
        ...

    def fit(self, size: Size) -> None:
        """Grow to at least this size."""
        ...

    def admit(self, slots: Sequence[int], rows: Sequence[Line]) -> None:
        """Let rows enter slots. They start from their prompts, or continue from the keys and values that they kept.

        The model computes all further tokens of the rows here, except the token to feed next.
        """
        ...

    def take(self, slot: int, most: int) -> Kept:
        """Copy what a slot's row needs to continue later; if possible, only its first `most` fed tokens."""
        ...

    def whole(self, slot: int, row: Line) -> Computed:
        """Copy keys and values of a slot's row and its prompt; if possible, without the row's last token."""
        ...

    def release(self, slot: int) -> None:
        """Free the slot: its row has left. Callers ignore what the slot still computes."""
        ...

    def forget(self, prompt: SharedPrompt) -> None:
        """Free a prompt: no more rows with it will enter."""
        ...

    def keep(self, slots: Sequence[int]) -> None:
        """Keep only these slots, renumbered from 0."""
        ...

    def close(self) -> None:
        """Free all buffers even if something, such as an error's traceback, still holds the session. Do not use the
        session afterwards."""
        ...

    def decoded(self) -> mx.array:
        """The number of tokens that each row has after its prompt: `[S]` int32."""
        ...

    def logits(self, tokens: mx.array) -> mx.array:
        """Feed one token to each slot, `[S]`, and return the next logits, `[S, V]`. Advances to the next step."""
        ...

    def wide(self, tokens: mx.array) -> mx.array:
        """Feed W tokens to each slot, `[S, W]`, and return the logits after each token, `[S, W, V]`.

        W is at most `widest`, and the slots must have room for W tokens. Call `accept` before any other change.
        """
        ...

    def accept(self, kept: Sequence[int]) -> None:
        """Keep the first `kept[slot]` of the tokens that `wide` has fed each slot, and advance to the next step."""
        ...


class Decoding(Protocol):
    """A model that is ready to decode."""

    vocabulary: int
    description: str
    refused: tuple[str, ...]
    """The faster kinds of decoding that were tried first, each with the reason why it is not used."""
    narrow: str | None
    """Why a step can feed a row only one token (`Session.widest` is 1). None if it can feed several."""

    side_by_side: bool
    """Whether several threads may step sessions in parallel: a step changes nothing that sessions share."""

    lockstep: bool
    """Whether other processes run the same steps with the rest of the model, so that no decision may depend on time."""

    def refresh(self) -> None:
        """Read the model's arrays again, and evaluate them."""
        ...

    def open(self, size: Size) -> Session:
        """Open a session of this size."""
        ...

    def close(self, session: Session) -> None:
        """Close a session, then `forget`."""
        ...

    def forget(self) -> None:
        """Release the weights that train, and all copies of weights, unless a session is open.

        An update may replace such a weight; the old array would then stay in memory next to the new array.
        """
        ...

    def memory(self, slots: int, places: int, prompt: int, completion: int, entering: int | None = None) -> int:
        """Bytes needed to decode this many slots and prompts simultaneously, of at most these lengths in tokens.

        `entering`: measured bytes that prompts take in addition while the model computes them; None: estimate them.
        """
        ...

    def outside(self, prompt: int, completion: int) -> int:
        """Bytes that a row keeps outside its slot, with at most this many tokens in its prompt and after it."""
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
        self.narrow = None if attention.widest > 1 else "its attention handles only one token per row and step"
        self._sessions: WeakSet[Session] = WeakSet()  # weak: a session whose engine was dropped is not open any more
        self.lockstep = is_divided(model)
        # Not with ModelDecoder: it patches the model's modules while a step runs, which another thread would see.
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
        except BaseException:  # for example, not enough memory
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
        """Tested on first use, because most runs never extend rows."""
        return extends_together(self.model, rounding(dtype_of(self.model)))

    def forget(self) -> None:
        if not self._sessions:
            self.decoder.forget()

    def memory(self, slots: int, places: int, prompt: int, completion: int, entering: int | None = None) -> int:
        token = sum(shape.bytes_per_token for shape in self.shapes)
        if self.side_by_side and slots >= LANES_FROM:  # each lane may hold a copy of a prompt
            places, entering = min(slots, MOST_LANES * places), None if entering else entering
        cached = self.decoder.copied + token * (slots * completion + places * prompt)
        grown = slots * completion * max(shape.at_work for shape in self.shapes)
        entering = self._entering(places, prompt) if entering is None else entering
        return cached + max(entering, grown, self._scores(slots * (prompt + completion)))

    def _entering(self, places: int, prompt: int) -> int:
        """Bytes that prompts take while the model computes them: their unpacked keys and values, and their scores."""
        at_once = min(places * prompt, max(prompt, PREFILL_TOKENS))
        numbers = at_once * sum(shape.numbers for shape in self.shapes)
        return numbers + self._scores(at_once * min(prompt, self._chunk))

    def _scores(self, pairs: int) -> int:
        """Bytes of one layer's attention scores, for a step or a prefill chunk: stock attention holds them."""
        return 0 if self.attention.overlaps else SCORES_HELD * 4 * self._query_heads * pairs

    @property
    def _chunk(self) -> int:
        """Tokens per prefill chunk on the machine that decodes: a plan may be for another machine than this one."""
        return PREFILL_CHUNK if isinstance(self.attention, FusedRowAttention) else prefill_chunk()

    def outside(self, prompt: int, completion: int) -> int:  # noqa: ARG002  the prompt is in a prefix place
        return completion * sum(shape.bytes_per_token for shape in self.shapes)
