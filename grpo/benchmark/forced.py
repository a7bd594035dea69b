"""Rows that end at given lengths, as if they had sampled a stop token there, for models with random weights."""

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
    """Stopping rules of a row that stops after `length` tokens; the engine does not know the length in advance."""

    def __init__(self, rules: Stopping, length: int) -> None:
        super().__init__(rules.sampling, rules.stop_ids, lambda _: "")
        self._length = length

    def reason(self, token_ids: Sequence[int]) -> FinishReason | None:
        """Stop at the row's length, regardless of the tokens."""
        return "stop" if len(token_ids) >= self._length else None


def submit(
    engine: Engine, requests: Sequence[Request], lengths: Sequence[int], sampling: Sampling, logprobs: bool
) -> list[Row]:
    """Queue the rows of all requests, request by request, to stop at these lengths. Draws depend only on positions."""
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
    """Sampled rows of these lengths; `queued` gets the rows before the first step.

    Raises RunError if a row has another length: the measured speed would be wrong.
    """
    with generator.open() as engine:
        rows = submit(engine, requests, lengths, sampling, logprobs)
        if queued is not None:
            queued(rows)
        while engine.busy:
            engine.step()
    if [len(row.token_ids) for row in rows] != list(lengths):
        raise RunError("the generator has not sampled the requested lengths")
    return rows
