"""The batched generator: many prompts, many completions of each, through a fixed number of slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.generation.choice import find_decoding
from grpo.generation.controller import Always
from grpo.generation.decoding import Decoding
from grpo.generation.engine import Engine
from grpo.generation.lanes import rollout_lanes
from grpo.generation.progress import TokenProgress
from grpo.generation.rows import Row, Submission
from grpo.generation.sampling import Sampling
from grpo.generation.speculation import Speculation
from grpo.generation.stopping import Stopping
from grpo.progress import Progress
from grpo.types import BEHAVIOUR, SAMPLER, FinishReason, Trajectory

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt (at least one token) and how many completions it is to get.

    With a `seed`, the draws of completion i at position t depend on (seed, i, t) alone: not on `n`, on the call's key,
    or on the other requests. Requests with the same seed share their draws.
    """

    prompt_ids: Sequence[int]
    n: int = 1
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One token of a stream, and the text that it completed, which may be none."""

    token_id: int
    text: str
    finish_reason: FinishReason | None


class Generator:
    """Samples completions from a model through a fixed number of slots."""

    def __init__(self, model: nn.Module, tokenizer: TokenizerWrapper, slots: int, kv_bits: int | None = None) -> None:
        """`kv_bits`: keep keys and values in 4 or 8 bits a number; None for the model's dtype. Raises UserError for a
        model whose keys and values cannot be quantised."""
        self.model, self.kv_bits = model, kv_bits
        self.tokenizer = tokenizer
        self.slots = slots
        self.kept_bytes: int | None = None
        """Bytes that rows may keep out of their slots, None for no bound. See `Engine`."""
        self.speculation: Speculation | None = None
        """What drafts tokens, so that a step can bring several; None for one token a step."""
        self.lanes: int | None = None
        """How many threads decode side by side, each with its share of the slots; None for as many as pay here."""
        self.neighbours = 1
        """Processes on this machine that share its cores, this one included (`Ranks.neighbours`)."""
        self.progress: Progress | None = None
        self.stop_ids = frozenset(tokenizer.eos_token_ids)
        layers = [array.size for layer in model.layers for _, array in tree_flatten(layer.parameters())]
        self._largest = max(layers, default=0)
        self._stream = mx.new_stream(mx.default_device())
        self._find_decoding()

    def describe(self) -> list[str]:
        """How the model is decoded, and why not by the ways that would be faster, for a person."""
        slower = [f"decoding does not go by {reason}" for reason in self.decoding.refused]
        return [f"decoding: {self.decoding.description}", *slower, *self._on_speculation()]

    def drafted(self) -> dict[str, float]:
        """What speculation has counted since this was last asked: the sums of a `DraftTally`. Nothing without it."""
        if not isinstance(self.speculation, Always) or self.decoding.narrow:
            return {}
        counts = self.speculation.tally.counts()
        self.speculation.tally.clear()
        return counts

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        key: mx.array,
        logprobs: bool = True,
        phase: str = "rollout",
    ) -> list[list[Trajectory]]:
        """`n` completions of each request, in the order of the requests.

        The draws of completion i of request r at position t depend on (`key`, r, i, t) alone, or on (seed, i, t) if the
        request has a seed: not on `n`, on how many requests there are, or on the number of slots. Without `logprobs`
        none are computed. `progress` is told the `phase`, the tokens so far, and the most that there can be.
        """
        call, told = seed_of(key), TokenProgress(self.progress, phase)
        with self.open() as engine:
            groups = [
                engine.submit(_submission(request, sampling, call, number, request.n, logprobs))
                for number, request in enumerate(requests)
            ]
            while engine.busy:
                engine.step()
                told.now_and_then(groups)
        told.tell(groups)
        return [[trajectory_of(row) for row in rows] for rows in groups]

    def stream(self, request: Request, sampling: Sampling, key: mx.array) -> Iterator[Event]:
        """Yield the first completion of a request token by token.

        The texts add up to the completion's. Text that may begin a stop string is held back until that is decided.
        Whoever stops early closes the iterator: that frees the buffers.
        """
        with self.open() as engine:
            (row,) = engine.submit(_submission(request, sampling, seed_of(key), 0, n=1, logprobs=False))
            yield from self._streamed(engine, row)

    def _streamed(self, engine: Engine, row: Row) -> Iterator[Event]:
        detokenizer, stopping = self.tokenizer.detokenizer, row.stopping
        silent = stopping.stop_ids | {i for i, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        detokenizer.reset()
        text, shown = "", 0
        while engine.busy:
            for token in engine.step():
                if token.token_id not in silent:
                    detokenizer.add_token(token.token_id)
                if token.finish_reason is not None:
                    detokenizer.finalize()
                text += detokenizer.last_segment
                until = stopping.sure(text)
                if token.finish_reason is not None:
                    until = len(stopping.text(row.token_ids)) if stopping.sampling.stop else len(text)
                yield Event(token.token_id, text[shown:until], token.finish_reason)
                shown = max(shown, until)

    def _on_speculation(self) -> list[str]:
        if not isinstance(self.speculation, Always):
            return []
        if self.decoding.narrow:
            return [f"speculation: off, because {self.decoding.narrow}"]
        if self.speculation.most == 1:
            return ["speculation: off, because memory has no room for steps of several tokens"]
        return [f"speculation: {self.speculation.description}"]

    def open(self) -> Engine:
        """Open an engine, whose rows can be submitted, parked and extended at any step."""
        return Engine(
            self._current_decoding,
            self._stopping,
            self.slots,
            self._stream,
            self._largest,
            self.kept_bytes,
            None if self.decoding.narrow else self.speculation,
            self._lanes(),
        )

    def _lanes(self) -> int:
        if not self.decoding.side_by_side:
            return 1
        pay = rollout_lanes(self.slots, self._largest, self.neighbours) if self.lanes is None else self.lanes
        return min(self.slots, pay)

    def _find_decoding(self) -> None:
        self._modules = [module for _, module in self.model.named_modules()]
        with mx.stream(self._stream):
            self.decoding = find_decoding(self.model, self.kv_bits)

    def _current_decoding(self) -> Decoding:
        """Found again if modules were replaced, as merging or loading an adapter does."""
        modules = [module for _, module in self.model.named_modules()]
        if len(modules) != len(self._modules) or any(a is not b for a, b in zip(modules, self._modules, strict=True)):
            self._find_decoding()
        return self.decoding

    def _stopping(self, sampling: Sampling) -> Stopping:
        return Stopping(sampling, self.stop_ids, lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True))


def seed_of(key: mx.array) -> int:
    """A call's key as the seed of its rows. Keys are not split off one another: how many there are would change all."""
    first, second = cast(list[int], key.tolist())
    return first << 32 | second


def _submission(request: Request, sampling: Sampling, call: int, number: int, n: int, logprobs: bool) -> Submission:
    seed, path = (call, (number,)) if request.seed is None else (request.seed, ())
    return Submission(request.prompt_ids, sampling, seed, path, n, logprobs)


def trajectory_of(row: Row, finish_reason: FinishReason | None = None) -> Trajectory:
    """What a row that has ended made: tokens that were put into it are not trained.

    `finish_reason` is why, where its environment knows more than the row.
    """
    reason = finish_reason or row.finish_reason
    assert reason is not None
    columns = {BEHAVIOUR: tuple(row.logprobs)} if row.wants_logprobs else {}
    if row.wants_sampler_logprobs:
        columns[SAMPLER] = tuple(row.sampler_logprobs)
    text = row.stopping.text(row.token_ids)
    return Trajectory(tuple(row.token_ids), tuple(row.trained), columns, text, reason)
