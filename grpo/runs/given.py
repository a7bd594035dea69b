"""Python objects that a run is given instead of what its recipe names by text."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpo.config import DataConfig
from grpo.data.loading import is_local, load_rows, open_stream, prepared_rows
from grpo.data.objects import rows_from
from grpo.data.rows import Rows
from grpo.data.source import Source
from grpo.data.stream import TaskStream
from grpo.data.streaming import Streamed
from grpo.plugins import SESSION, Function, find_function

if TYPE_CHECKING:
    from grpo.environments.environment import Environment

MakeSource = Callable[[TaskStream], Source]


@dataclass(frozen=True, slots=True)
class Given:
    """Functions by their `use` in the recipe (`name_of`), and data by section of the recipe (`data` or `eval`)."""

    functions: dict[str, Function] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    source: MakeSource | None = None
    """Makes the source of the run's tasks from the stream that the recipe's `data` section describes."""

    def function(self, use: str, kind: str) -> Function:
        """The function that `use` names. Errors mention its `kind`. Raises UserError as `find_function` does."""
        return self.functions.get(use) or find_function(use, kind)

    def environment(self, use: str, kwargs: Mapping[str, Any]) -> Environment:
        """The environment with a method `rollout` that `use` names. Raises UserError as `find_environment` does."""
        from grpo.environments.environment import find_environment  # imports MLX, which `grpo.tasks` must not do

        given: Any = self.functions.get(use)
        environment: Environment = find_environment(use, kwargs) if given is None else given
        return environment

    def rows(self, section: str, cfg: DataConfig) -> Rows | Streamed:
        """The rows of a section: from the object given for it, or else from what `cfg` names.

        Raises UserError as `load_rows` does.
        """
        if section not in self.data:
            return open_stream(cfg) if cfg.streaming else load_rows(cfg)
        return prepared_rows(rows_from(self.data[section], f"{section}: the object given for it", cfg.split), cfg)

    def is_local(self, section: str, cfg: DataConfig) -> bool:
        """Whether the rows can be loaded without the Hub."""
        return section in self.data or is_local(cfg)

    def sources(self) -> dict[str, str]:
        """The SHA-256 of each function's source, by its `use`. Functions without a source file are left out.

        Only the function's own lines are hashed, not the functions that it calls.
        """
        chosen = {} if self.source is None else {"source": self.source}
        read = {use: _source(function) for use, function in (self.functions | chosen).items()}
        return {use: hashlib.sha256(text.encode()).hexdigest() for use, text in read.items() if text is not None}


NOTHING = Given()


def name_of(function: Callable[..., Any], taken: Iterable[str] = ()) -> str:
    """The `use` in a recipe of a function that was given as an object: `module:function` if it can be imported from
    there, or else `__main__:name`, which only this session knows. If the name is in `taken`, it gets a number."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    module = getattr(function, "__module__", None) or SESSION
    if module != SESSION and name.isidentifier() and _found(module, name) is function:
        return f"{module}:{name}"
    plain = f"{SESSION}:{name.rpartition('.')[2].strip('<>')}"
    taken, number, chosen = set(taken), 2, plain
    while chosen in taken:
        chosen, number = f"{plain}_{number}", number + 1
    return chosen


def _found(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # importing a module may raise anything; then other processes cannot import it either
        return None


def _source(function: Function) -> str | None:
    try:
        code = inspect.isroutine(function) or inspect.isclass(function)
        return inspect.getsource(inspect.unwrap(function) if code else type(function))
    except (OSError, TypeError):
        return None
