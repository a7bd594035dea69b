"""Continuous batching: rows wait in a queue, take a free slot, and leave it when they stop."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from grpo.generation.cache import Prefix, Slots, prefill, require_plain_cache
from grpo.generation.sampling import Sampling, sample
from grpo.types import Completion, FinishReason

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

PREFILL_TOKENS = 16_384
"""Prompt tokens, padding included, that are prefilled together."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt (at least one token) and how many completions it is to get."""

    prompt_ids: Sequence[int]
    n: int = 1


@dataclass(slots=True)
class _Row:
    """One completion in the making."""

    request: int
    key: mx.array
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Generator:
    """Samples completions from a model through a fixed number of slots."""

    def __init__(self, model: nn.Module, tokenizer: TokenizerWrapper, slots: int) -> None:
        """Raises UserError for a model whose cache is not plain keys and values."""
        require_plain_cache(model)
        self.model = model
        self.tokenizer = tokenizer
        self.slots = slots
        self.stop_ids = frozenset(tokenizer.eos_token_ids)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, key: mx.array, logprobs: bool = True
    ) -> list[list[Completion]]:
        """`n` completions of each request, in the order of the requests.

        A row's draws depend on `key` and on which completion of which request it is, not on the number of slots
        nor on its neighbours. Without `logprobs` none are computed.
        """
        groups: list[list[Completion]] = [[] for _ in requests]
        rows = self._rows(requests, key)
        for _ in self._decode(rows, requests, sampling, logprobs):
            pass
        for row in rows:
            groups[row.request].append(self._completion(row, logprobs))
        return groups

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling, key: mx.array) -> Iterator[str]:
        """The text of one completion, in pieces as it comes."""
        request = Request(prompt_ids)
        (row,) = rows = self._rows([request], key)
        detokenizer = self.tokenizer.detokenizer
        detokenizer.reset()
        for _ in self._decode(rows, [request], sampling, logprobs=False):
            if row.finish_reason != "stop":
                detokenizer.add_token(row.token_ids[-1])
                yield detokenizer.last_segment
        detokenizer.finalize()
        yield detokenizer.last_segment

    def _rows(self, requests: Sequence[Request], key: mx.array) -> list[_Row]:
        owners = [number for number, request in enumerate(requests) for _ in range(request.n)]
        return [_Row(owner, k) for owner, k in zip(owners, mx.random.split(key, len(owners)), strict=True)]

    def _decode(
        self, rows: Sequence[_Row], requests: Sequence[Request], sampling: Sampling, logprobs: bool
    ) -> Iterator[None]:
        """Run rows to their end, filling them in place; yields after every step."""
        queue = deque(rows)
        prefixes = _Prefixes(self.model, requests)
        count = min(self.slots, len(rows))
        slots = Slots(count, prefixes.width, sampling.max_tokens, len(self.model.layers))
        active: list[_Row | None] = [None] * count
        tokens = mx.zeros(count, mx.uint32)
        keys = mx.zeros((count, 2), mx.uint32)
        while True:
            free = [slot for slot, row in enumerate(active) if row is None]
            if queue and free:
                admitted = [(slot, queue.popleft()) for slot in free[: len(queue)]]
                slots.admit([slot for slot, _ in admitted], prefixes.of([row.request for _, row in admitted], queue))
                for slot, row in admitted:
                    active[slot], keys[slot] = row, row.key
                    tokens[slot] = requests[row.request].prompt_ids[-1]
            elif len(free) == len(active):
                return
            elif len(free) >= len(active) // 2 and free:  # the tail: do not drag empty slots along
                kept = [slot for slot, row in enumerate(active) if row is not None]
                slots.keep(kept)
                active = [active[slot] for slot in kept]
                tokens, keys = tokens[mx.array(kept)], keys[mx.array(kept)]
            tokens = self._step(tokens, keys, slots, active, sampling, logprobs)
            yield
            active = [row if row and row.finish_reason is None else None for row in active]

    def _step(
        self,
        tokens: mx.array,
        keys: mx.array,
        slots: Slots,
        active: Sequence[_Row | None],
        sampling: Sampling,
        logprobs: bool,
    ) -> mx.array:
        """One token for every slot; the rows get theirs. Returns the tokens, which the next step feeds."""
        logits = self.model(tokens[:, None], cache=slots.layers)[:, -1]
        counters = mx.stack([mx.zeros_like(slots.decoded), slots.decoded], axis=1).astype(mx.uint32)
        tokens, token_logprobs = sample(logits, keys + counters, sampling.temperature, logprobs)
        # Not pipelined: a step in flight would hold the buffers, and the next write would copy them.
        mx.eval(tokens, token_logprobs)
        slots.advance()
        chosen: Any = tokens.tolist()
        values: Any = token_logprobs.tolist() if token_logprobs is not None else None
        for slot, (row, token) in enumerate(zip(active, chosen, strict=True)):
            if row is None:
                continue
            row.token_ids.append(token)
            if values is not None:
                row.logprobs.append(values[slot])
            if token in self.stop_ids:
                row.finish_reason = "stop"
            elif len(row.token_ids) == sampling.max_tokens:
                row.finish_reason = "length"
        return tokens

    def _completion(self, row: _Row, logprobs: bool) -> Completion:
        assert row.finish_reason is not None
        shown = row.token_ids[:-1] if row.finish_reason == "stop" else row.token_ids
        text = self.tokenizer.decode(shown, skip_special_tokens=True)
        return Completion(tuple(row.token_ids), tuple(row.logprobs) if logprobs else None, text, row.finish_reason)


class _Prefixes:
    """Prefills each prompt once for its whole group, just before its first row is admitted."""

    def __init__(self, model: nn.Module, requests: Sequence[Request]) -> None:
        self._model = model
        self._requests = requests
        self.width = max(len(request.prompt_ids) for request in requests) - 1
        self._ready: dict[int, Prefix] = {}

    def of(self, wanted: Sequence[int], queue: Sequence[_Row]) -> list[Prefix]:
        """The prefixes of these requests, by number; those that no row in `queue` will ask for are forgotten."""
        missing = [number for number in dict.fromkeys(wanted) if number not in self._ready]
        at_once = max(1, PREFILL_TOKENS // max(1, self.width))
        for start in range(0, len(missing), at_once):
            batch = missing[start : start + at_once]
            prompts = [self._requests[number].prompt_ids for number in batch]
            self._ready.update(zip(batch, prefill(self._model, prompts, self.width), strict=True))
        found = [self._ready[number] for number in wanted]
        still_wanted = Counter(row.request for row in queue)
        self._ready = {number: prefix for number, prefix in self._ready.items() if still_wanted[number]}
        return found
