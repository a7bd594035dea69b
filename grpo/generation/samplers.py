"""Rows with different sampling settings in one step."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from grpo.generation.rows import Row
from grpo.generation.sampling import Drawn, TokenSampler
from grpo.generation.stopping import Way


class Samplers:
    """One sampler per distinct sampling. Each sampler draws for all slots; a row uses the draw of its own sampler.

    Usually all rows have the same sampling, so there is only one sampler.
    """

    def __init__(self, slots: int, vocabulary: int) -> None:
        self._slots, self._vocabulary = slots, vocabulary
        self._by_way: dict[Way, TokenSampler] = {}
        self._chosen: list[mx.array] = []

    def seat(self, entering: Sequence[tuple[int, Row]], seated: Sequence[Row | None]) -> None:
        """Admit rows to slots. `seated` are the rows of all slots afterwards."""
        alike: dict[Way, list[tuple[int, Row]]] = {}
        for slot, row in entering:
            alike.setdefault(row.stopping.way, []).append((slot, row))
        for way, pairs in alike.items():
            if way not in self._by_way:
                self._by_way[way] = TokenSampler(*way, self._slots, self._vocabulary)
            sequences = [[*row.prompt.ids, *row.token_ids] for _, row in pairs]
            self._by_way[way].admit([slot for slot, _ in pairs], [row.key for _, row in pairs], sequences)
        if len(self._by_way) > 1:
            ways = [row.stopping.way if row is not None else None for row in seated]
            self._by_way = {way: sampler for way, sampler in self._by_way.items() if way in ways}
            self._chosen = [mx.array([other == way for other in ways]) for way in self._by_way]

    def grow(self, slots: int) -> None:
        """Grow to this many slots."""
        for sampler in self._by_way.values():
            sampler.grow(slots)
        self._chosen = [mx.pad(chosen, (0, slots - self._slots)) for chosen in self._chosen]
        self._slots = slots

    def keep(self, slots: Sequence[int]) -> None:
        """Keep only these slots."""
        index = mx.array(list(slots))
        for sampler in self._by_way.values():
            sampler.keep(index)
        self._chosen = [chosen[index] for chosen in self._chosen]
        self._slots = len(slots)

    def draw(self, logits: mx.array, decoded: mx.array, logprobs: bool) -> Drawn:
        """See `TokenSampler.draw`. Ignore the sampler logprobs of rows whose distribution is the model's own."""
        return self._combined([sampler.draw(logits, decoded, logprobs) for sampler in self._by_way.values()], 1)

    def draw_wide(self, logits: mx.array, fed: mx.array, decoded: mx.array, logprobs: bool) -> Drawn:
        """See `TokenSampler.draw_wide`."""
        drawn = [sampler.draw_wide(logits, fed, decoded, logprobs) for sampler in self._by_way.values()]
        return self._combined(drawn, fed.shape[1])

    def take(self, taken: Sequence[Sequence[int]]) -> None:
        """See `TokenSampler.take`."""
        for sampler in self._by_way.values():
            sampler.take(taken)

    def _combined(self, draws: Sequence[Drawn], width: int) -> Drawn:
        first, *others = draws
        for drawn, chosen in zip(others, self._chosen[1:], strict=False):
            first = _either(mx.repeat(chosen, width) if width > 1 else chosen, drawn, first)
        return first


def _either(chosen: mx.array, drawn: Drawn, others: Drawn) -> Drawn:
    """`drawn` where `chosen` `[S]` is true, `others` elsewhere."""

    def where(first: mx.array | None, second: mx.array | None) -> mx.array | None:
        if first is None or second is None:
            return second if first is None else first
        return mx.where(chosen, first, second)

    return Drawn(
        mx.where(chosen, drawn.tokens, others.tokens),
        where(drawn.logprobs, others.logprobs),
        where(drawn.sampler_logprobs, others.sampler_logprobs),
    )
