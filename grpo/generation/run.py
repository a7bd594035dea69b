"""Continuous batching: rows wait in a queue, take a free slot, and leave it when they stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from grpo.generation.decoding import Session
from grpo.generation.sampling import Drawn, Sampler
from grpo.generation.stopping import Stopping
from grpo.types import FinishReason


@dataclass(slots=True, eq=False)
class Row:
    """One completion in the making. `launched` counts the tokens whose steps have begun."""

    request: int
    prompt_ids: Sequence[int]
    key: mx.array
    launched: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class _Step:
    """A step under way: what it draws, and for which rows, by slot."""

    rows: list[Row | None]
    drawn: Drawn

    def launch(self) -> None:
        mx.async_eval(self.drawn.arrays())  # type: ignore[no-untyped-call]


class Run:
    """Rows on their way through the slots of one session."""

    def __init__(
        self, rows: Sequence[Row], slots: int, session: Session, sampler: Sampler, stopping: Stopping, logprobs: bool
    ) -> None:
        self._queue = deque(rows)
        self._active: list[Row | None] = [None] * slots
        self._session, self._sampler, self._stopping = session, sampler, stopping
        self._logprobs = logprobs
        self._tokens = mx.zeros(slots, mx.uint32)

    def steps(self) -> Iterator[None]:
        """Decode to the end. Rows are filled in place; yields whenever their tokens have come.

        The host reads one step behind the device. Where launching over a running step would make MLX copy the buffers,
        the next step's graph is built meanwhile, and launched when the running one has been read.
        """
        flying: _Step | None = None
        while True:
            if flying is not None and self._session.overlaps and self._will_rearrange():
                self._read(flying)
                flying = None
                yield
            self._arrange()
            step = self._next_step()
            if step is not None and self._session.overlaps:
                step.launch()
            if flying is not None:
                self._read(flying)
                yield
            elif step is None:
                return
            if step is not None and not self._session.overlaps:
                step.launch()
            flying = step

    def _free(self) -> list[int]:
        return [slot for slot, row in enumerate(self._active) if row is None]

    def _is_tail(self, free: Sequence[int]) -> bool:
        """Whether so many slots are empty for good that the others had better go on alone."""
        return not self._queue and len(self._active) > len(free) >= (len(self._active) + 1) // 2

    def _will_rearrange(self) -> bool:
        """Whether buffers are about to be changed that a step in flight may read."""
        free = self._free()
        entering = [self._queue[i].request for i in range(min(len(free), len(self._queue)))]
        return self._is_tail(free) or self._session.needs_prefill(entering)

    def _arrange(self) -> None:
        """Let waiting rows into free slots; where none wait and most slots are free, drop those."""
        free = self._free()
        if entering := [(slot, self._queue.popleft()) for slot in free[: len(self._queue)]]:
            slots, rows = [slot for slot, _ in entering], [row for _, row in entering]
            self._session.admit(slots, [row.request for row in rows])
            self._sampler.admit(slots, [row.key for row in rows], [row.prompt_ids for row in rows])
            first = mx.array([row.prompt_ids[-1] for row in rows], mx.uint32)
            # Not `self._tokens[...] = first`: a step that has not been read holds the same object.
            self._tokens = mx.put_along_axis(self._tokens, mx.array(slots), first, axis=0)
            for slot, row in entering:
                self._active[slot] = row
        elif self._is_tail(free):
            kept = [slot for slot, row in enumerate(self._active) if row is not None]
            index = mx.array(kept)
            self._session.keep(kept)
            self._sampler.keep(index)
            self._tokens = self._tokens[index]
            self._active = [self._active[slot] for slot in kept]

    def _next_step(self) -> _Step | None:
        """The graph of one more token for every slot, or None if no slot has a row."""
        if not any(self._active):
            return None
        decoded = self._session.decoded()
        drawn = self._sampler.draw(self._session.logits(self._tokens), decoded, self._logprobs)
        self._tokens = drawn.tokens
        step = _Step(list(self._active), drawn)
        for slot, row in enumerate(self._active):
            if row is not None:
                row.launched += 1
                if row.launched == self._stopping.sampling.max_tokens:  # it ends with this token, whatever it is
                    self._leave(slot)
        return step

    def _read(self, step: _Step) -> None:
        """Hand a step's tokens to their rows, but to those that had stopped when it began."""
        drawn: list[Any] = [a.tolist() if a is not None else None for a in
                            (step.drawn.tokens, step.drawn.logprobs, step.drawn.sampler_logprobs)]  # fmt: skip
        tokens, logprobs, sampler_logprobs = drawn
        for slot, row in enumerate(step.rows):
            if row is None or row.finish_reason is not None:
                continue
            row.token_ids.append(tokens[slot])
            if logprobs is not None:
                row.logprobs.append(logprobs[slot])
            if sampler_logprobs is not None:
                row.sampler_logprobs.append(sampler_logprobs[slot])
            row.finish_reason = self._stopping.reason(row.token_ids)
            if row.finish_reason is not None and row.launched < self._stopping.sampling.max_tokens:
                self._leave(self._active.index(row))

    def _leave(self, slot: int) -> None:
        self._active[slot] = None
        self._session.release(slot)
