"""Draws the next token, and computes its logprobs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from grpo.backend import cuda
from grpo.backend.device import on_gpu
from grpo.backend.maths import chosen, logsumexp, logsumexp_and_powers
from grpo.generation import cuda_sampling
from grpo.generation.blockwise import drawn_by_blocks
from grpo.generation.filters import cut, repetition_penalised, threshold
from grpo.model.logprobs import scaled, token_logprobs


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are sampled, and when they end.

    `temperature` 0 is greedy. `repetition_penalty` (CTRL, arXiv 1909.05858) counts prompt and completion. Then follow
    the temperature, `top_k` (0: off), `top_p` (arXiv 1904.09751) and `min_p` (arXiv 2407.01082), in the order of
    transformers.

    `max_tokens` counts the stop token; before `min_tokens` tokens, no stop token can be drawn. `stop` are strings that
    end a completion; `stop_ids` are tokens that end it, in addition to the tokenizer's. A row ends when its last tokens
    are `max_repeats` copies of the same tokens (0: never). `max_turn_tokens` limits each turn of a row (0: only
    `max_tokens` limits it).
    """

    temperature: float = 1.0
    max_tokens: int = 256
    min_tokens: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    max_repeats: int = 0
    max_turn_tokens: int = 0

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def reshaped(self) -> bool:
        """Whether the sampling distribution can differ from the model's distribution at this temperature."""
        return self.filtered or self.repetition_penalty != 1 or self.min_tokens > 0


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token per row, `[S]` uint32, and its logprobs, `[S]` fp32, if requested.

    `logprobs` are the model's at the sampling temperature; `sampler_logprobs` are those of the distribution that tokens
    were drawn from, None if it is the same.
    """

    tokens: mx.array
    logprobs: mx.array | None
    sampler_logprobs: mx.array | None

    def arrays(self) -> list[mx.array]:
        return [a for a in (self.tokens, self.logprobs, self.sampler_logprobs) if a is not None]


_categorical = mx.vmap(lambda logits, key: mx.random.categorical(logits, key=key))


class _Places(NamedTuple):
    """The inputs of N draws: logits `[N, V]`, counts of decoded tokens `[N]`, keys `[N, 2]`, `seen` `[N, V]` bool."""

    logits: mx.array
    decoded: mx.array
    keys: mx.array
    seen: mx.array | None


def _random(logits: mx.array, places: _Places) -> tuple[mx.array, mx.array]:
    """Draw tokens from the softmax of logits `[N, V]` fp32. Returns the tokens and the logsumexps, `[N]` each.

    A CPU and a GPU draw different tokens with the same keys.
    """
    counters = mx.stack([mx.zeros_like(places.decoded), places.decoded], axis=1).astype(mx.uint32)
    keys = places.keys + counters
    if on_gpu():
        return _categorical(logits, keys), logsumexp(logits)
    total, powers, sums = logsumexp_and_powers(logits)
    return drawn_by_blocks(powers, sums, keys), total


def _seen_behind(seen: mx.array, fed: mx.array) -> mx.array:
    """The tokens seen up to each fed token: `[S · W, V]`, from `seen` `[S, V]` and the fed tokens `[S, W]`."""
    rows = [seen]  # the first fed token was drawn before, so `seen` has it
    for place in range(1, fed.shape[1]):
        rows.append(mx.put_along_axis(rows[-1], fed[:, place : place + 1], mx.array(True), axis=-1))
    return mx.stack(rows, axis=1).flatten(0, 1)


class TokenSampler:
    """Draws for all slots together. With a repetition penalty, the device records the tokens that each slot saw."""

    def __init__(self, sampling: Sampling, stop_ids: Iterable[int], slots: int, vocabulary: int) -> None:
        self.sampling = sampling
        self.keys = mx.zeros((slots, 2), mx.uint32)
        stops = mx.zeros(vocabulary, mx.bool_)
        stops[mx.array(sorted(i for i in stop_ids if i < vocabulary), mx.int32)] = True
        self._stops = stops
        self._seen = mx.zeros((slots, vocabulary), mx.bool_) if sampling.repetition_penalty != 1 else None

    def admit(self, slots: Sequence[int], keys: Sequence[mx.array], prompts: Sequence[Sequence[int]]) -> None:
        """Begin rows with these keys and prompts in these slots."""
        self.keys[mx.array(list(slots))] = mx.stack(list(keys))
        if self._seen is not None:
            self._seen[mx.array(list(slots))] = False
            where = [slot for slot, prompt in zip(slots, prompts, strict=True) for _ in prompt]
            self._seen[mx.array(where), mx.array([token for prompt in prompts for token in prompt])] = True

    def grow(self, slots: int) -> None:
        """Grow to this many slots."""
        more = slots - self.keys.shape[0]
        self.keys = mx.pad(self.keys, [(0, more), (0, 0)])
        if self._seen is not None:
            self._seen = mx.pad(self._seen, [(0, more), (0, 0)])

    def keep(self, slots: mx.array) -> None:
        """Keep only these slots."""
        self.keys = self.keys[slots]
        if self._seen is not None:
            self._seen = self._seen[slots]

    def draw(self, logits: mx.array, decoded: mx.array, logprobs: bool) -> Drawn:
        """Draw a token for each slot.

        logits `[S, V]` in the model's dtype; decoded `[S]`, the number of tokens of each row. Only this number and the
        row's key determine the draw, not the other rows. The logprobs of greedy tokens are at temperature 1.
        """
        drawn = self._drawn(_Places(logits, decoded, self.keys, self._seen), logprobs)
        if self._seen is not None:
            self._seen = mx.put_along_axis(self._seen, drawn.tokens[:, None], mx.array(True), axis=-1)
        return drawn

    def draw_wide(self, logits: mx.array, fed: mx.array, decoded: mx.array, logprobs: bool) -> Drawn:
        """Draw a token after each fed token, as `draw` would if all fed tokens up to there had been drawn: `[S · W]`.

        logits `[S, W, V]`, fed `[S, W]`. Call `take` with the tokens that each slot accepts.
        """
        width = fed.shape[1]
        at = (decoded[:, None] + mx.arange(width)).flatten()
        seen = None if self._seen is None else _seen_behind(self._seen, fed)
        places = _Places(logits.flatten(0, 1), at, mx.repeat(self.keys, width, axis=0), seen)
        return self._drawn(places, logprobs)

    def take(self, taken: Sequence[Sequence[int]]) -> None:
        """After `draw_wide`, record the tokens that each slot accepts."""
        slots = [slot for slot, tokens in enumerate(taken) for _ in tokens]
        if self._seen is not None and slots:
            self._seen[mx.array(slots), mx.array([token for tokens in taken for token in tokens])] = True

    def _drawn(self, places: _Places, logprobs: bool) -> Drawn:
        by_kernel = cuda.available() and self.sampling.temperature > 0
        return (self._draw_on_cuda if by_kernel else self._draw)(places, logprobs)

    def _draw(self, places: _Places, logprobs: bool) -> Drawn:
        plain = scaled(places.logits, self.sampling.temperature or 1.0)
        shaped = self._reshaped(places) if self.sampling.reshaped else plain
        if self.sampling.temperature == 0:
            tokens, total = mx.argmax(shaped, axis=-1), logsumexp(shaped)
        else:
            tokens, total = _random(shaped, places)
        if not logprobs:
            return Drawn(tokens, None, None)
        sampled = chosen(shaped, tokens) - total
        if not self.sampling.reshaped:
            return Drawn(tokens, sampled, None)
        return Drawn(tokens, token_logprobs(plain, tokens), sampled)

    def _draw_on_cuda(self, places: _Places, logprobs: bool) -> Drawn:
        s = self.sampling
        logits = cuda_sampling.Logits(
            places.logits, s.temperature, places.decoded, self._stops, s.min_tokens, places.seen, s.repetition_penalty
        )
        lowest = cuda_sampling.threshold(logits, s.top_k, s.top_p, s.min_p) if s.filtered else None
        tokens, plain, sampled = cuda_sampling.draw(logits, lowest, places.keys, logprobs)
        return Drawn(tokens, plain if logprobs else None, sampled if logprobs and s.reshaped else None)

    def _reshaped(self, places: _Places) -> mx.array:
        """Logits of the sampling distribution, fp32, with -inf for tokens that must not be drawn."""
        sampling, logits = self.sampling, places.logits.astype(mx.float32)
        if places.seen is not None:
            logits = repetition_penalised(logits, places.seen, sampling.repetition_penalty)
        logits = scaled(logits, sampling.temperature or 1.0)
        if sampling.min_tokens:
            early = (places.decoded < sampling.min_tokens)[:, None]
            logits = mx.where(early & self._stops, -math.inf, logits)
        if not sampling.filtered:
            return logits
        return cut(logits, threshold(logits, sampling.top_k, sampling.top_p, sampling.min_p))
