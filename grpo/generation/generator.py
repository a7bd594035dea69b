"""The batched generator: several completions for each of many prompts, through a fixed number of slots."""

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
    """A prompt (at least one token), and the number of completions to sample.

    With a `seed`, the draw of completion i at position t depends only on (seed, i, t): not on `n`, on the call's key,
    or on the other requests. Requests with the same seed share their draws.
    """

    prompt_ids: Sequence[int]
    n: int = 1
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One token of a stream, and the text that it completed, which may be empty."""

    token_id: int
    text: str
    finish_reason: FinishReason | None


class Generator:
    """Samples completions from a model through a fixed number of slots."""

    def __init__(self, model: nn.Module, tokenizer: TokenizerWrapper, slots: int, kv_bits: int | None = None) -> None:
        """`kv_bits`: store keys and values in 4 or 8 bits per number; None: in the model's dtype. Raises UserError if
        the keys and values of the model cannot be quantized."""
        self.model, self.kv_bits = model, kv_bits
        self.tokenizer = tokenizer
        self.slots = slots
        self.kept_bytes: int | None = None
        """Limit on the bytes that rows may keep outside their slots; None: no limit. See `Engine`."""
        self.speculation: Speculation | None = None
        """Drafts tokens, so that a step can yield several per row; None: one token per step."""
        self.lanes: int | None = None
        """Number of threads that decode in parallel, each with its share of the slots; None: as many as pay here."""
        self.neighbours = 1
        """Number of processes that share this machine's cores, including this process (`Ranks.neighbours`)."""
        self.progress: Progress | None = None
        self.stop_ids = frozenset(tokenizer.eos_token_ids)
        layers = [array.size for layer in model.layers for _, array in tree_flatten(layer.parameters())]
        self._largest = max(layers, default=0)
        self._stream = mx.new_stream(mx.default_device())
        self._find_decoding()

    def describe(self) -> list[str]:
        """Lines for people: how the model is decoded, and why the faster kinds of decoding are not used."""
        slower = [f"decoding does not use {reason}" for reason in self.decoding.refused]
        return [f"decoding: {self.decoding.description}", *slower, *self._on_speculation()]

    def drafted(self) -> dict[str, float]:
        """The sums of speculation's `DraftTally` since the last call. Empty without speculation."""
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
        """Sample `n` completions for each request, and return them in the order of the requests.

        The draw of completion i of request r at position t depends only on (`key`, r, i, t), or on (seed, i, t) if the
        request has a seed: not on `n`, the number of requests, or the number of slots. With `logprobs=False`, no
        logprobs are computed. `progress` receives the `phase`, the number of tokens so far, and its upper bound.
        """
        call, progress = seed_of(key), TokenProgress(self.progress, phase)
        with self.open() as engine:
            groups = [
                engine.submit(_submission(request, sampling, call, number, request.n, logprobs))
                for number, request in enumerate(requests)
            ]
            while engine.busy:
                engine.step()
                progress.now_and_then(groups)
        progress.tell(groups)
        return [[trajectory_of(row) for row in rows] for rows in groups]

    def stream(self, request: Request, sampling: Sampling, key: mx.array) -> Iterator[Event]:
        """Yield the first completion of a request token by token.

        The texts of all events together are the completion's text. Text that may be the beginning of a stop string is
        held back until that is known. Close the iterator to stop early: this frees the buffers.
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
        """Open an engine, in which rows can be submitted, parked and extended at any step."""
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
        """The decoding, found again if modules were replaced, for example by merging or loading an adapter."""
        modules = [module for _, module in self.model.named_modules()]
        if len(modules) != len(self._modules) or any(a is not b for a, b in zip(modules, self._modules, strict=True)):
            self._find_decoding()
        return self.decoding

    def _stopping(self, sampling: Sampling) -> Stopping:
        return Stopping(sampling, self.stop_ids, lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True))


def seed_of(key: mx.array) -> int:
    """The seed for a call's rows, from its key. Keys are not split: the number of rows would change all of them."""
    first, second = cast(list[int], key.tolist())
    return first << 32 | second


def _submission(request: Request, sampling: Sampling, call: int, number: int, n: int, logprobs: bool) -> Submission:
    seed, path = (call, (number,)) if request.seed is None else (request.seed, ())
    return Submission(request.prompt_ids, sampling, seed, path, n, logprobs)


def trajectory_of(row: Row, finish_reason: FinishReason | None = None) -> Trajectory:
    """The trajectory of a row that has ended. Tokens that were not sampled are not trained.

    `finish_reason`, if given, replaces the row's own: the environment may know more.
    """
    reason = finish_reason or row.finish_reason
    assert reason is not None
    columns = {BEHAVIOUR: tuple(row.logprobs)} if row.wants_logprobs else {}
    if row.wants_sampler_logprobs:
        columns[SAMPLER] = tuple(row.sampler_logprobs)
    text = row.stopping.text(row.token_ids)
    return Trajectory(tuple(row.token_ids), tuple(row.trained), columns, text, reason)
