"""Who grades when a reward is tried out: a function in a process of its own, or a reward model in this one."""

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
"""Characters of the longest completion of the fuzz that a model is given: it reads each of them whole."""


@contextmanager
def cases_of(located: Located, terms: WorkerTerms, file: str | None) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """The cases of a reward, and the arguments that they share, whose sources live as long as the block.

    Raises UserError where the function or the file cannot be had.
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
    """The reward with these arguments, ready. `calls`: what one call gets, where a function is not to decide that."""
    if model_in(located.where):
        yield _model(located.where, json.dumps(dict(kwargs), sort_keys=True, default=str))
        return
    with closing(Isolated(located, kwargs, terms, calls=calls)) as grader:
        grader.wait_ready()
        yield grader


@lru_cache(1)
def _model(use: str, kwargs: str) -> Inline:
    """A reward model, which is loaded once for all calls. A call gets a group: of cases each is a group."""
    from grpo.scoring.modeled import Modeled  # functions are tried without a model's libraries

    return Modeled(with_settings(RewardConfig(use=use), {"kwargs": json.loads(kwargs)}, use), calls="group")
