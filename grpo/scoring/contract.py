"""TRL's contract for a reward function: how grpo loads it, which arguments it receives, what it may return.

`f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric) -> list[float | None]`, plain
or `async`. Anything else is recorded as a failure with a description. Worker processes import this module, so it
imports nothing heavy.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from grpo.scoring.arguments import GIVEN, HOOKS, check_kwargs, is_factory, made, taker
from grpo.scoring.forms import ROLES, AskedForMessages, Form, Probe, declared_form, expects_messages, in_form
from grpo.scoring.names import check_column, check_metric
from grpo.scoring.text import counted
from grpo.types import FailureKind

if TYPE_CHECKING:
    import asyncio

Columns = Mapping[str, Sequence[Any]]
"""Column name to a list with one value per completion."""

LONGEST_MESSAGE, FRAMES = 2000, 10
"""Limits on a recorded error: characters of the exception's message, and traceback frames."""
LARGEST = 1e15
"""The largest score: with larger scores, a group's standard deviation would overflow float32."""


UNUSABLE = "not a usable number"
"""Start of the error for a score that is not a number, or not finite."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of one call: a score or None per completion, and an error per failed completion.

    `failures` maps a completion's index to its error; `kind` is the kind of these failures. `extras` holds one value
    per completion by column (`log_extra`), `metrics` holds values by name (`log_metric`). `fatal`: the function's
    process died in the call or was killed.
    """

    values: list[float | None]
    failures: dict[int, str] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    kind: FailureKind = "error"
    fatal: bool = False

    @staticmethod
    def failed(count: int, error: str, kind: FailureKind = "error", seconds: float = 0.0) -> Answer:
        """The answer of a call that failed for all its completions."""
        return Answer([None] * count, dict.fromkeys(range(count), error), seconds=seconds, kind=kind)


class Reward:
    """A reward function with its arguments from the recipe.

    `form` is the recipe's setting for the form of completions and prompts, `system` is the system message before text
    prompts. `run` runs the coroutine of an asynchronous function; by default, each `Reward` has an event loop. Raises
    ValueError if the arguments do not fit.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        kwargs: Mapping[str, Any],
        form: Form | None = None,
        system: str | None = None,
        run: Callable[[Coroutine[Any, Any, Any]], Any] | None = None,
    ) -> None:
        check_kwargs(function, kwargs)
        self.kwargs, self._paid = dict(kwargs), is_paid(function)
        if is_factory(function):
            function, self.kwargs = made(function, kwargs), {}
        self.function = function
        completions = form or declared_form(function, "completions")
        self._forms = {"completions": completions, "prompts": form or declared_form(function, "prompts") or completions}
        self._system = system
        self._has_answered = False
        self._takes = taker(function)
        runner = functools.cache(_runner)  # one event loop for all calls: clients and locks are bound to their loop
        self._run = run or (lambda coroutine: runner().run(coroutine))

    def problem(self, columns: Collection[str]) -> str | None:
        """Why the function cannot be called with these columns of the dataset; None if it can."""
        given = {*columns, *GIVEN} - {"prompt"}
        if twice := given & set(self.kwargs):
            return f"kwargs.{min(twice)}: the dataset has a column of the same name"
        try:
            inspect.signature(self.function).bind(
                **dict.fromkeys(given), **self.kwargs, **self._taken(dict.fromkeys(HOOKS))
            )
        except ValueError:  # a builtin without a signature
            return None
        except TypeError as error:
            remedy = "add **_ to its parameters for arguments that it does not use"
            return f"{error}; grpo calls it with {', '.join(sorted(given))} ({remedy})"
        return None

    def __call__(self, columns: Columns, state: Mapping[str, Any]) -> Answer:
        """Score the completions of `columns`. Raises only KeyboardInterrupt, which asks the process to stop.

        Every other exception of the function is recorded as a failure, MemoryError and SystemExit included.
        """
        began = time.perf_counter()
        answer = self._tried(columns, self._forms, state)
        if isinstance(answer, BaseException):
            again = (
                self._tried_with_messages(columns, state) if self._asks_for_messages(columns, state, answer) else None
            )
            answer = again or Answer.failed(len(columns["completions"]), self._said(answer))
        elif any(columns["completions"]):
            self._has_answered = True
        return replace(answer, seconds=time.perf_counter() - began)

    def _asks_for_messages(self, columns: Columns, state: Mapping[str, Any], error: BaseException) -> bool:
        """Whether the function failed because it expects messages and was given texts.

        Other mistakes raise the same errors, for example reading a column or a judge's reply as a dictionary. So this
        calls the function again with the longest completion as a `Probe`, which detects such a use (an empty text
        raises IndexError instead). It does not if the function has scored texts before, or if its file says that calls
        cost money.
        """
        if self._forms["completions"] is not None or self._has_answered or self._paid:
            return False
        if type(error) is not IndexError and not expects_messages(error):
            return False
        longest = max(range(len(columns["completions"])), key=lambda place: len(columns["completions"][place]))
        alone = {name: [values[longest]] for name, values in columns.items()}
        probes = {name: [Probe(value) if isinstance(value, str) else value for value in alone[name]] for name in ROLES}
        return isinstance(self._tried({**alone, **probes}, self._forms, state), AskedForMessages)

    def _said(self, error: BaseException) -> str:
        said = _raised(error)
        if not (self._paid and self._forms["completions"] is None and expects_messages(error)):
            return said
        what, newline, frames = said.partition("\n")
        return f"{what} (if it reads chat messages, write completions: messages next to its `use`){newline}{frames}"

    def _tried_with_messages(self, columns: Columns, state: Mapping[str, Any]) -> Answer | None:
        """The answer on messages, and from now on the function gets messages; None if it fails on messages too."""
        forms: dict[str, Form | None] = dict.fromkeys(ROLES, "messages")
        answer = self._tried(columns, forms, state)
        if isinstance(answer, BaseException):  # the form was not the cause: the first error is more useful
            return None
        self._forms = forms
        return answer

    def _tried(
        self, columns: Columns, forms: Mapping[str, Form | None], state: Mapping[str, Any]
    ) -> Answer | BaseException:
        try:
            return self._called(columns, forms, state)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's code: the error is recorded and kept out of the gradient
            return error

    def _called(self, columns: Columns, forms: Mapping[str, Form | None], state: Mapping[str, Any]) -> Answer:
        """The answer of one call. Raises what the function raises."""
        count = len(columns["completions"])
        extras: dict[str, list[Any]] = {}
        metrics: dict[str, list[float]] = {}

        def log_extra(column: str, values: Sequence[Any]) -> None:
            check_column(column)
            if len(values) != count:
                raise ValueError(f"log_extra({column!r}): {len(values)} values for {count} completions")
            extras[column] = json.loads(json.dumps(list(values), default=str))  # storable, in a worker or inline

        def log_metric(name: str, value: float) -> None:
            check_metric(name)
            if math.isfinite(number := float(value)):  # a mean over nothing is NaN: nothing to log
                metrics.setdefault(name, []).append(number)

        hooks = {"trainer_state": SimpleNamespace(**state), "log_extra": log_extra, "log_metric": log_metric}
        values = self.function(**in_form(columns, forms, self._system), **self.kwargs, **self._taken(hooks))
        values = self._run(_awaited(values)) if inspect.isawaitable(values) else values
        values = list(values) if _is_listlike(values) else values
        scores, failures = checked(values, count)
        return Answer(scores, failures, extras, metrics)

    def _taken(self, hooks: Mapping[str, Any]) -> dict[str, Any]:
        return {name: hook for name, hook in hooks.items() if self._takes(name)}


def calls_of(function: Callable[..., Any]) -> str:
    """What one call gets: the `CALLS` of the function's file (`"step"`, `"group"` or `"completion"`), by default a
    step's completions. Raises ValueError for another value."""
    module = sys.modules.get(getattr(function, "__module__", ""))
    calls = getattr(module, "CALLS", "step")
    if calls not in ("step", "group", "completion"):
        raise ValueError(f"CALLS = {calls!r} in its file: expected step, group or completion")
    return str(calls)


def is_paid(function: Callable[..., Any]) -> bool:
    """Whether a call costs money: the function's file says so by `PAID = True`."""
    return bool(getattr(sys.modules.get(getattr(function, "__module__", "")), "PAID", False))


def checked(values: Any, count: int) -> tuple[list[float | None], dict[int, str]]:
    """The scores in a function's return value, and an error per index for what breaks the contract.

    A function may return an exception instead of a score: only that completion failed.
    """
    if not isinstance(values, list):
        wrong = f"expected a list with a number or None per completion, got {values!r:.80}"
        return [None] * count, dict.fromkeys(range(count), wrong)
    if len(values) != count:
        wrong = f"{counted(len(values), 'score')} for {counted(count)}; a reward returns one score per completion"
        return [None] * count, dict.fromkeys(range(count), wrong)
    scores = [_number(value) for value in values]
    return scores, {
        place: f"{type(value).__name__}: {value}"[:LONGEST_MESSAGE]
        if isinstance(value, Exception)
        else f"{UNUSABLE}: {value!r:.80}"
        for place, value in enumerate(values)
        if value is not None and scores[place] is None
    }


def _raised(error: BaseException) -> str:
    """The exception's message, then the innermost traceback frames, without those of this module."""
    inner = error.__traceback__
    while inner is not None and inner.tb_frame.f_code.co_filename == __file__:
        inner = inner.tb_next
    what = "".join(traceback.format_exception_only(error)).strip()[:LONGEST_MESSAGE]
    return f"{what}\n{''.join(traceback.format_tb(inner, limit=-FRAMES))}".rstrip()


def _runner() -> asyncio.Runner:
    import asyncio  # takes a fifth of a worker's start, and few functions need it

    return asyncio.Runner()


async def _awaited(answer: Any) -> Any:
    return await answer


def _is_listlike(values: Any) -> bool:
    """Whether `values` is a list, tuple, array or generator, rather than a text, mapping or set."""
    return isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set)


def _number(value: Any) -> float | None:
    """The value as a float, or None if it is not a number within ± LARGEST (numpy's scalars are numbers)."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except Exception:  # an object whose __float__ is the user's code
        return None
    return number if abs(number) <= LARGEST else None  # false for NaN
