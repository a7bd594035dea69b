"""The asyncio side of a request in progress."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from grpo.serving.asks import Answerer, Ask, Piece, Ticket, Told
from grpo.serving.choices import Completed
from grpo.serving.refusals import Refusal


class Exchange:
    """The prompts of one HTTP request, which decode in parallel, and their completions so far: `choices`."""

    def __init__(self, decoder: Answerer, asks: Sequence[Ask]) -> None:
        self.choices = [Completed(number) for number in range(sum(ask.n for ask in asks))]
        self._decoder, self._loop = decoder, asyncio.get_running_loop()
        self._reports: asyncio.Queue[tuple[int, Told]] = asyncio.Queue()
        self._tickets: list[Ticket] = [self._submitted(ask, number * ask.n) for number, ask in enumerate(asks)]

    @property
    def over(self) -> bool:
        """Whether all choices have ended."""
        return all(choice.ended for choice in self.choices)

    async def next(self) -> list[tuple[Completed, Piece]]:
        """Wait for new tokens, add them to their choices, and return them. Raises Refusal if there will be no more."""
        first, report = await self._reports.get()
        if isinstance(report, Refusal):
            raise report
        found = [(self.choices[first + piece.index], piece) for piece in report]
        for choice, piece in found:
            choice.add(piece)
        return found

    async def end(self) -> list[Completed]:
        """Wait until all choices have ended, and return them."""
        while not self.over:
            await self.next()
        return self.choices

    def close(self) -> None:
        """Stop decoding this request's prompts."""
        for ticket in self._tickets:
            self._decoder.cancel(ticket)

    def _submitted(self, ask: Ask, first: int) -> Ticket:
        def tell(report: Told) -> None:
            try:
                self._loop.call_soon_threadsafe(self._reports.put_nowait, (first, report))
            except RuntimeError:  # the event loop is closed: nothing can receive tokens
                self._decoder.cancel(ticket)

        ticket = self._decoder.submit(ask, tell)
        return ticket


class Turnstile:
    """Limits the number of requests in progress, including those that wait for a slot."""

    def __init__(self, most: int) -> None:
        self.most, self.inside = most, 0

    @contextmanager
    def enter(self, requests: int = 1) -> Iterator[None]:
        """Count requests as in progress inside the block. Raises Refusal if there would be too many."""
        if self.inside + requests > self.most:
            raise Refusal(
                429,
                f"the server is busy: {self.inside} requests are in progress, and the limit is {self.most}",
                "busy",
                headers={"Retry-After": "1"},
            )
        self.inside += requests
        try:
            yield
        finally:
            self.inside -= requests
