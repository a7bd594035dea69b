"""The batched generator: many prompts, many completions of each, through a fixed number of slots."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend import blas
from grpo.backend.random import derive_key
from grpo.generation.choice import find_decoding
from grpo.generation.decoding import Work
from grpo.generation.run import Row, Run
from grpo.generation.sampling import Sampler, Sampling
from grpo.generation.stopping import Stopping
from grpo.types import Completion, FinishReason, Progress

if TYPE_CHECKING:
    from grpo.model.mlxlm import TokenizerWrapper

TELL_EVERY = 0.5
"""Seconds between two reports of progress: counting tokens at every step would be work for the host."""
SMALL_PRODUCT = 64 * 2**20
"""Multiplications in a step's largest product, below which a second BLAS thread on a CPU costs more than it gives."""


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

    def __init__(self, model: nn.Module, tokenizer: TokenizerWrapper, slots: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.slots = slots
        self.progress: Progress | None = None
        self.stop_ids = frozenset(tokenizer.eos_token_ids)
        layers = [array.size for layer in model.layers for _, array in tree_flatten(layer.parameters())]
        self._largest = max(layers, default=0)
        self._stream = mx.new_stream(mx.default_device())
        self._find_decoding()

    def describe(self) -> list[str]:
        """How the model is decoded, and why not by the ways that would be faster, for a person."""
        slower = [f"decoding does not go by {reason}" for reason in self.decoding.refused]
        return [f"decoding: {self.decoding.description}", *slower]

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        key: mx.array,
        logprobs: bool = True,
        phase: str = "rollout",
    ) -> list[list[Completion]]:
        """`n` completions of each request, in the order of the requests.

        The draws of completion i of request r at position t depend on (`key`, r, i, t) alone, or on (seed, i, t) if the
        request has a seed: not on `n`, on how many requests there are, or on the number of slots. Without `logprobs`
        none are computed. `progress` is told the `phase`, the tokens so far, and the most that there can be.
        """
        rows, stopping, told = _rows(requests, key), self._stopping(sampling), 0.0
        for _ in self._steps(requests, rows, stopping, logprobs):
            if self.progress is not None and (now := time.monotonic()) - told >= TELL_EVERY:
                told = now
                self.progress(phase, *_tokens(rows, sampling.max_tokens))
        if self.progress is not None:
            self.progress(phase, *_tokens(rows, sampling.max_tokens))
        self.decoding.forget()
        groups: list[list[Completion]] = [[] for _ in requests]
        for row in rows:
            groups[row.request].append(_completion(row, stopping, logprobs))
        return groups

    def stream(self, request: Request, sampling: Sampling, key: mx.array) -> Iterator[Event]:
        """The first completion of a request, token by token as they come.

        All texts together are the completion's. What may turn out to begin a stop string waits until it does not.
        """
        request = Request(request.prompt_ids, 1, request.seed)
        (row,) = rows = _rows([request], key)
        detokenizer, stopping = self.tokenizer.detokenizer, self._stopping(sampling)
        silent = stopping.stop_ids | {i for i, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        detokenizer.reset()
        text, shown = "", 0
        for _ in self._steps([request], rows, stopping, logprobs=False):
            token = row.token_ids[-1]
            if token not in silent:
                detokenizer.add_token(token)
            if row.finish_reason is not None:
                detokenizer.finalize()
            text += detokenizer.last_segment
            until = stopping.sure(text)
            if row.finish_reason is not None:
                until = len(stopping.text(row.token_ids)) if sampling.stop else len(text)
            yield Event(token, text[shown:until], row.finish_reason)
            shown = max(shown, until)
            if row.finish_reason is not None:
                return

    def _find_decoding(self) -> None:
        self._modules = [module for _, module in self.model.named_modules()]
        with mx.stream(self._stream):
            self.decoding = find_decoding(self.model)

    def _follow_the_model(self) -> None:
        """Find the way of decoding again if modules were replaced, as merging or loading an adapter does."""
        modules = [module for _, module in self.model.named_modules()]
        if len(modules) != len(self._modules) or any(a is not b for a, b in zip(modules, self._modules, strict=True)):
            self._find_decoding()

    def _stopping(self, sampling: Sampling) -> Stopping:
        return Stopping(sampling, self.stop_ids, lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True))

    def _steps(
        self, requests: Sequence[Request], rows: Sequence[Row], stopping: Stopping, logprobs: bool
    ) -> Iterator[None]:
        """Run rows to their end on the generator's own stream; yields whenever tokens have come."""
        if not rows:
            return
        self._follow_the_model()
        slots, sampling = min(self.slots, len(rows)), stopping.sampling
        with mx.stream(self._stream):
            work = Work([r.prompt_ids for r in requests], [r.n for r in requests], slots, sampling.max_tokens)
            sampler = Sampler(sampling, stopping.stop_ids, slots, self.decoding.vocabulary)
            steps = Run(rows, slots, self.decoding.open(work), sampler, stopping, logprobs).steps()
        small = slots * self._largest < SMALL_PRODUCT
        while True:
            # Not around the yield: what the caller does there is not ours.
            with mx.stream(self._stream), blas.one_thread(small):
                if next(steps, False) is False:
                    return
            yield


def _rows(requests: Sequence[Request], key: mx.array) -> list[Row]:
    """A row for each completion. Keys are not split off one another: how many there are would change them all."""
    first, second = cast(list[int], key.tolist())
    call, rows = first << 32 | second, []
    for number, request in enumerate(requests):
        seed, position = (call, (number,)) if request.seed is None else (request.seed, ())
        draws = [derive_key(seed, "row", *position, sample) for sample in range(request.n)]
        rows += [Row(number, request.prompt_ids, own) for own in draws]
    return rows


def _tokens(rows: Sequence[Row], longest: int) -> tuple[int, int]:
    """Tokens so far, and the most that there can be: an upper bound that falls as rows stop early."""
    done = sum(len(row.token_ids) for row in rows)
    return done, done + sum(longest - len(row.token_ids) for row in rows if row.finish_reason is None)


def _completion(row: Row, stopping: Stopping, logprobs: bool) -> Completion:
    assert row.finish_reason is not None
    return Completion(
        token_ids=tuple(row.token_ids),
        logprobs=tuple(row.logprobs) if logprobs else None,
        text=stopping.text(row.token_ids),
        finish_reason=row.finish_reason,
        sampler_logprobs=tuple(row.sampler_logprobs) if row.sampler_logprobs else None,
    )
