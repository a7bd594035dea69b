"""A reward function in this process (`Inline`) or in a worker process (`Isolated`), and the request that it scores."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from grpo.config import RewardConfig
from grpo.errors import UserError
from grpo.plugins import Function, Located, locate_reward
from grpo.scoring.arguments import takes_environments
from grpo.scoring.contract import Answer, Columns, Reward, calls_of, is_paid
from grpo.scoring.forms import Form
from grpo.scoring.process import Span, Worker, WorkerTerms
from grpo.types import Conversation

Answers = list[tuple[Span, Answer]]
"""One answer per call with the span of the call's completions, in order."""


class ScoringRequest:
    """The completions to score: their columns, the sizes of their groups, and the trainer's state.

    `conversations` has the conversation of each completion, None for a single answer. The columns are pickled once for
    all workers.
    """

    def __init__(
        self,
        columns: Columns,
        sizes: Sequence[int],
        state: Mapping[str, Any],
        conversations: Sequence[Conversation | None] = (),
    ) -> None:
        self.columns, self.sizes, self.state, self.conversations = columns, sizes, state, conversations
        self.count = len(columns["completions"])
        self._pickled: bytes | None = None
        self._lock = threading.Lock()

    def spans(self, calls: str) -> list[Span]:
        """The spans of completions for each call. `calls` is `step`, `group` or `completion`; no span is empty."""
        sizes: Iterable[int] = {"step": [self.count], "group": self.sizes, "completion": [1] * self.count}[calls]
        ends: list[int] = []
        for size in sizes:
            ends.append(size + (ends[-1] if ends else 0))
        return [(begin, end) for begin, end in zip([0, *ends], ends, strict=False) if begin < end]

    def pickled(self) -> bytes:
        with self._lock:
            if self._pickled is None:
                self._pickled = pickle.dumps(self.columns)
            return self._pickled


class Inline:
    """A function that runs in the trainer's process: fast, but without a time limit or a memory limit."""

    def __init__(
        self,
        name: str,
        function: Function,
        kwargs: Mapping[str, Any],
        calls: str | None = None,
        form: Form | None = None,
        system: str | None = None,
    ) -> None:
        self.name = name
        try:
            self._reward = Reward(function, kwargs, form, system)
            self.calls, self.paid = calls or calls_of(function), is_paid(function)
            self.takes_environments = takes_environments(self._reward.function)
        except ValueError as error:
            raise UserError(f"reward {name!r}: {error}") from None

    def problem(self, columns: Collection[str]) -> str | None:
        """Why the function cannot be called with these columns of the dataset; None if it can."""
        return self._reward.problem(columns)

    def score(self, request: ScoringRequest) -> Answers:
        """One answer per call."""
        return [
            ((begin, end), self._reward({n: v[begin:end] for n, v in request.columns.items()}, request.state))
            for begin, end in request.spans(self.calls)
        ]

    def wait_ready(self) -> None:
        """Nothing to wait for: the function is already imported."""

    def close(self) -> None:
        """Nothing to close: there is no process."""


class Isolated:
    """A function that runs in a worker process."""

    def __init__(
        self, located: Located, kwargs: Mapping[str, Any], terms: WorkerTerms, calls: str | None = None
    ) -> None:
        """Start the worker without waiting for it. Raises UserError for an unset variable of `terms.env`."""
        self.name, self._calls = located.name, calls
        self.worker = Worker(located, kwargs, terms)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"reward {self.name}")  # one thread uses a worker

    @property
    def calls(self) -> str:
        """What one call gets: see `calls_of`. Available after `wait_ready`."""
        return self._calls or self.worker.calls

    @property
    def paid(self) -> bool:
        """Whether a call costs money. Available after `wait_ready`."""
        return self.worker.paid

    @property
    def takes_environments(self) -> bool:
        """Whether the function takes the argument `environments`. Available after `wait_ready`."""
        return self.worker.takes_environments

    def wait_ready(self) -> None:
        """Wait until the worker has imported the function. Raises UserError if the import fails, or if the arguments
        do not fit."""
        self.worker.wait_ready()

    def problem(self, columns: Collection[str]) -> str | None:
        """Why the function cannot be called with these columns of the dataset; None if it can."""
        return self.worker.problem(columns)

    def begin(self) -> None:
        """Begin a scoring, which may have several requests."""
        self.worker.begin()

    def submit(self, score: Callable[[ScoringRequest], Answers], request: ScoringRequest) -> Future[Answers]:
        """The future of `score(request)`, which runs in the worker's thread after the earlier submissions."""
        return self._thread.submit(score, request)

    def score(self, request: ScoringRequest) -> Answers:
        """One answer per call."""
        spans = request.spans(self.calls)
        try:
            columns = request.pickled()
        except Exception as error:  # a value of the dataset cannot be pickled
            said = f"the dataset's columns cannot be sent to the reward's process: {type(error).__name__}: {error}"
            return [((begin, end), Answer.failed(end - begin, said)) for begin, end in spans]
        return list(zip(spans, self.worker.score(columns, spans, request.state), strict=True))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.worker.close()


def make_grader(config: RewardConfig, system: str | None = None, function: Function | None = None) -> Inline | Isolated:
    """The grader of a reward function in the recipe; `system` is the system message before text prompts.

    A `function` that was passed as an object runs in this process. Raises UserError for a reward that cannot be loaded.
    """
    located = locate_reward(config.use)
    located = Located(config.name or located.name, located.where, located.what)
    if function is not None or config.isolation == "inline":
        called = function or located.load()
        return Inline(located.name, called, config.kwargs, config.calls, config.completions, system)
    terms = WorkerTerms(config.timeout, config.completions, system, config.env, config.memory_gb)
    return Isolated(located, config.kwargs, terms, config.calls)
