"""Rows of random weights that end at lengths of our choosing, as if they had drawn a stop token there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grpo.errors import RunError
from grpo.generation.engine import Engine
from grpo.generation.generator import Generator, Request
from grpo.generation.rows import Row, Submission
from grpo.generation.sampling import Sampling
from grpo.generation.stopping import Stopping
from grpo.types import FinishReason


class Until(Stopping):
    """The rules of a row that stops after `length` tokens, which nobody knows before."""

    def __init__(self, rules: Stopping, length: int) -> None:
        super().__init__(rules.sampling, rules.stop_ids, lambda _: "")
        self._length = length

    def reason(self, token_ids: Sequence[int]) -> FinishReason | None:
        """Stop at this length, whatever the tokens are."""
        return "stop" if len(token_ids) >= self._length else None


def submit(
    engine: Engine, requests: Sequence[Request], lengths: Sequence[int], sampling: Sampling, logprobs: bool
) -> list[Row]:
    """Queue the rows of all requests, which stop at these lengths, request by request. Draws depend on places alone."""
    rows: list[Row] = []
    for number, request in enumerate(requests):
        submission = Submission(request.prompt_ids, sampling, 0, (number,), request.n, logprobs)
        rows += engine.submit(submission)
    for row, length in zip(rows, lengths, strict=True):
        row.stopping = Until(row.stopping, length)
    return rows


def sample(
    generator: Generator,
    requests: Sequence[Request],
    lengths: Sequence[int],
    sampling: Sampling,
    logprobs: bool,
    queued: Callable[[list[Row]], object] | None = None,
) -> list[Row]:
    """Rows of these lengths, sampled; `queued` is shown them before the first step.

    Raises RunError where one has another length: its speed would mean nothing.
    """
    with generator.open() as engine:
        rows = submit(engine, requests, lengths, sampling, logprobs)
        if queued is not None:
            queued(rows)
        while engine.busy:
            engine.step()
    if [len(row.token_ids) for row in rows] != list(lengths):
        raise RunError("the generator has not sampled the lengths that it was asked for")
    return rows
