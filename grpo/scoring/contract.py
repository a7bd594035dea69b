"""TRL's contract for one reward function: how it is made ready, what it receives, what it may answer.

`f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric) -> list[float | None]`, plain
or `async`. Whatever else it does is a failure, and described. This module is imported by worker processes, so it
imports nothing heavy.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import inspect
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from grpo.scoring.names import check_column, check_metric

Columns = Mapping[str, Sequence[Any]]
"""A value for each completion, by name."""

GIVEN = ("prompts", "completions", "completion_ids")
HOOKS = ("trainer_state", "log_extra", "log_metric")
"""Arguments that a function receives only if it takes them."""
LONGEST_MESSAGE, FRAMES = 2000, 10
"""Of an error: characters of what was raised, and calls that led there."""
LARGEST = 1e15
"""The largest score: beyond it a group's deviation would overflow float32."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call came to: a score or None for each completion, and for those that it failed on, why.

    `kind` says of what kind the failures are. `extras` holds a value for each completion by column (`log_extra`),
    `metrics` values by name (`log_metric`).
    """

    values: list[float | None]
    failures: dict[int, str] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    kind: Literal["error", "timeout"] = "error"

    @staticmethod
    def failed(count: int, error: str, kind: Literal["error", "timeout"] = "error", seconds: float = 0.0) -> Answer:
        """The answer of a call that failed for all of its completions."""
        return Answer([None] * count, dict.fromkeys(range(count), error), seconds=seconds, kind=kind)


class Reward:
    """A function with the recipe's arguments for it.

    Raises ValueError where they do not fit: the message says how.
    """

    def __init__(self, function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        _check_kwargs(function, kwargs)
        self.kwargs = dict(kwargs)
        if is_factory(function):
            function, self.kwargs = _made(function, kwargs), {}
        self.function = function
        self._takes = _taker(function)
        self._runner = functools.cache(asyncio.Runner)  # one event loop for all calls: clients and locks belong to one

    def problem(self, columns: Collection[str]) -> str | None:
        """Why the function could not be called with these columns of the dataset; None if it can be."""
        given = {*columns, *GIVEN} - {"prompt"}
        if twice := given & set(self.kwargs):
            return f"kwargs.{min(twice)}: the dataset has a column of that name"
        try:
            inspect.signature(self.function).bind(
                **dict.fromkeys(given), **self.kwargs, **self._taken(dict.fromkeys(HOOKS))
            )
        except ValueError:  # a builtin without a signature
            return None
        except TypeError as error:
            return f"{error}; it is called with {', '.join(sorted(given))} (take **_ for the rest)"
        return None

    def __call__(self, columns: Columns, state: Mapping[str, Any]) -> Answer:
        """Score the completions of `columns`. Raises KeyboardInterrupt alone: it asks the process to stop.

        A MemoryError or a SystemExit is the function's failure, like all else that it raises.
        """
        count = len(columns["completions"])
        extras: dict[str, list[Any]] = {}
        metrics: dict[str, list[float]] = {}

        def log_extra(column: str, values: Sequence[Any]) -> None:
            check_column(column)
            if len(values) != count:
                raise ValueError(f"log_extra({column!r}): {len(values)} values for {count} completions")
            extras[column] = json.loads(json.dumps(list(values), default=str))  # wherever it runs, what can be stored

        def log_metric(name: str, value: float) -> None:
            check_metric(name)
            metrics.setdefault(name, []).append(float(value))

        hooks = {"trainer_state": SimpleNamespace(**state), "log_extra": log_extra, "log_metric": log_metric}
        began = time.perf_counter()
        try:
            values = self.function(**columns, **self.kwargs, **self._taken(hooks))
            values = self._runner().run(_awaited(values)) if inspect.isawaitable(values) else values
            values = list(values) if _is_listlike(values) else values
            scores, failures = checked(values, count)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # other people's code: recorded, shown, kept out of the gradient
            return Answer.failed(count, _raised(error), seconds=time.perf_counter() - began)
        return Answer(scores, failures, extras, metrics, time.perf_counter() - began)

    def _taken(self, hooks: Mapping[str, Any]) -> dict[str, Any]:
        return {name: hook for name, hook in hooks.items() if self._takes(name)}


def is_factory(function: Callable[..., Any]) -> bool:
    """Whether calling it makes a reward function: a class, or what takes neither completions nor everything."""
    if inspect.isclass(function):
        return True
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return False
    return not any(name in parameters for name in GIVEN) and not _takes_everything(parameters)


def calls_of(function: Callable[..., Any]) -> str:
    """What one call gets, as the function's file says: `CALLS = "step"`, `"group"` or `"completion"`."""
    module = sys.modules.get(getattr(function, "__module__", ""))
    calls = getattr(module, "CALLS", "step")
    if calls not in ("step", "group", "completion"):
        raise ValueError(f"CALLS = {calls!r} in its file: it is step, group or completion")
    return str(calls)


def checked(values: Any, count: int) -> tuple[list[float | None], dict[int, str]]:
    """What a function returned, against the contract: scores, and what is wrong by place.

    An exception in the place of a score says what went wrong with that completion alone.
    """
    if not isinstance(values, list):
        wrong = f"a list with a number or None for each completion was expected, not {values!r:.80}"
        return [None] * count, dict.fromkeys(range(count), wrong)
    if len(values) != count:
        return [None] * count, dict.fromkeys(range(count), f"{len(values)} scores for {count} completions")
    scores = [_number(value) for value in values]
    return scores, {
        place: f"{type(value).__name__}: {value}"[:LONGEST_MESSAGE]
        if isinstance(value, Exception)
        else f"not a usable number: {value!r:.80}"
        for place, value in enumerate(values)
        if value is not None and scores[place] is None
    }


def ending(code: int) -> str:
    """How a process ended, of its exit code (minus the signal that killed it), in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _raised(error: BaseException) -> str:
    """What was raised, then the last lines that led there, from the reward function inwards."""
    inner = error.__traceback__.tb_next if error.__traceback__ else None
    what = "".join(traceback.format_exception_only(error)).strip()[:LONGEST_MESSAGE]
    return f"{what}\n{''.join(traceback.format_tb(inner, limit=-FRAMES))}".rstrip()


def _check_kwargs(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """An argument must be one that the function names, of the type it says."""
    if not kwargs:
        return
    parameters = inspect.signature(function).parameters
    named = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    ours = [name for name in named if name not in (*GIVEN, *HOOKS)]
    for name, value in kwargs.items():
        if name not in ours:
            close = difflib.get_close_matches(name, ours, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else f" It takes {', '.join(ours) or 'none'}."
            raise ValueError(f"kwargs.{name}: there is no such argument.{meant}")
        _check_type(name, value, _annotation(function, name))


def _annotation(function: Callable[..., Any], name: str) -> Any:
    import typing

    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except Exception:  # names that only exist for type checkers
        return Any
    return hints.get(name, Any)


def _check_type(name: str, value: Any, annotation: Any) -> None:
    if annotation is Any:
        return
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a type with a configuration of its own
        adapter = TypeAdapter(annotation)
    try:
        adapter.validate_json(_json(value), strict=True)
    except ValidationError as error:
        expected = error.errors()[0]["msg"].replace("Input should be", "expected", 1)
        raise ValueError(f"kwargs.{name}: {expected}, got {_json(value)}") from None


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _made(factory: Callable[..., Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"kwargs: {error}") from None
    try:
        made = factory(**kwargs)
    except ValueError:
        raise
    except Exception as error:  # other people's code, before the run
        raise ValueError(f"it cannot be made ready: {type(error).__name__}: {error}") from error
    if not callable(made):
        raise ValueError(
            "it takes neither completions nor **kwargs, so it was called as a factory with the recipe's kwargs; "
            f"that should give a reward function, not {made!r:.80}"
        )
    return made  # type: ignore[no-any-return]


def _taker(function: Callable[..., Any]) -> Callable[[str], bool]:
    """Whether the function takes an argument of a name."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return lambda _: True
    everything = _takes_everything(parameters)
    return lambda name: everything or name in parameters


def _takes_everything(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


async def _awaited(answer: Any) -> Any:
    return await answer


def _is_listlike(values: Any) -> bool:
    """Lists, tuples, arrays, generators; not what only happens to be iterable."""
    return isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping | Set)


def _number(value: Any) -> float | None:
    """The value as a float, or None for what is not a number between ± LARGEST (numpy's scalars are numbers)."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except Exception:  # an object of other people's
        return None
    return number if abs(number) <= LARGEST else None  # false for NaN
