"""Loads a reward for a test: a function in a worker process, or a reward model in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import lru_cache
from typing import Any

from grpo.config import RewardConfig
from grpo.errors import UserError
from grpo.plugins import JUDGE, Located, model_in
from grpo.recipes import with_settings
from grpo.scoring.casefile import find_cases
from grpo.scoring.grader import Inline, Isolated
from grpo.scoring.process import Worker, WorkerTerms

SHORT = 200
"""Maximum number of characters of a fuzz completion for a reward model, which would be slow on long ones."""


@contextmanager
def cases_of(located: Located, terms: WorkerTerms, file: str | None) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """The cases of a reward, and the arguments that they share (`case_kwargs`), which are valid inside the block.

    Raises UserError if the function or the file cannot be loaded.
    """
    if located.where == JUDGE:
        from grpo.scoring.judge import SELF

        raise UserError(SELF)
    if model_in(located.where):
        yield ([] if file is None else find_cases(None, located, file)[0]), {}
        return
    with closing(Worker(located, None, terms, file)) as host:
        host.wait_ready()
        yield host.cases, host.case_kwargs


@contextmanager
def grader_of(
    located: Located, kwargs: Mapping[str, Any], terms: WorkerTerms, calls: str | None = None
) -> Iterator[Inline | Isolated]:
    """The reward with these arguments, ready. `calls` overrides what the function's file says about one call."""
    if model_in(located.where):
        yield _model(located.where, json.dumps(dict(kwargs), sort_keys=True, default=str))
        return
    with closing(Isolated(located, kwargs, terms, calls=calls)) as grader:
        grader.wait_ready()
        yield grader


@lru_cache(1)
def _model(use: str, kwargs: str) -> Inline:
    """A reward model, loaded once for all calls. A call gets one group, and each case is a group."""
    from grpo.scoring.modeled import Modeled  # tests of functions do not need the model's libraries

    return Modeled(with_settings(RewardConfig(use=use), {"kwargs": json.loads(kwargs)}, use), calls="group")
