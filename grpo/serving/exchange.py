"""The asyncio side of a request under way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from grpo.serving.asks import Answerer, Ask, Piece, Ticket, Told
from grpo.serving.choices import Completed
from grpo.serving.refusals import Refusal


class Exchange:
    """The prompts of one HTTP request, which decode side by side. `choices` are what they have come to."""

    def __init__(self, decoder: Answerer, asks: Sequence[Ask]) -> None:
        self.choices = [Completed(number) for number in range(sum(ask.n for ask in asks))]
        self._decoder, self._loop = decoder, asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[int, Told]] = asyncio.Queue()
        self._tickets: list[Ticket] = [self._submitted(ask, number * ask.n) for number, ask in enumerate(asks)]

    @property
    def over(self) -> bool:
        """Whether all choices have ended."""
        return all(choice.ended for choice in self.choices)

    async def next(self) -> list[tuple[Completed, Piece]]:
        """The next tokens, which are in their choices already. Raises Refusal where there will be none."""
        first, told = await self._told.get()
        if isinstance(told, Refusal):
            raise told
        found = [(self.choices[first + piece.index], piece) for piece in told]
        for choice, piece in found:
            choice.add(piece)
        return found

    async def end(self) -> list[Completed]:
        """All choices, when they have ended."""
        while not self.over:
            await self.next()
        return self.choices

    def close(self) -> None:
        """Let nothing of it decode any longer."""
        for ticket in self._tickets:
            self._decoder.cancel(ticket)

    def _submitted(self, ask: Ask, first: int) -> Ticket:
        def tell(told: Told) -> None:
            try:
                self._loop.call_soon_threadsafe(self._told.put_nowait, (first, told))
            except RuntimeError:  # the loop is closed: nobody is left to be told
                self._decoder.cancel(ticket)

        ticket = self._decoder.submit(ask, tell)
        return ticket


class Turnstile:
    """Lets so many requests be under way at once, those that wait included."""

    def __init__(self, most: int) -> None:
        self.most, self.inside = most, 0

    @contextmanager
    def enter(self, requests: int = 1) -> Iterator[None]:
        """Raises Refusal where there is no room."""
        if self.inside + requests > self.most:
            raise Refusal(
                429,
                f"{self.inside} requests are under way, and there may be {self.most}",
                "busy",
                headers={"Retry-After": "1"},
            )
        self.inside += requests
        try:
            yield
        finally:
            self.inside -= requests
