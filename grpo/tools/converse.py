"""A conversation of a run's model with its environment and tools, shown live, for `grpo generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any

from grpo.backend.random import derive_key
from grpo.data.prompts import PromptRenderer
from grpo.data.streaming import Streamed
from grpo.environments.conversations import Conversations
from grpo.environments.shown import asked as asked_of
from grpo.environments.shown import end_of, said_in
from grpo.errors import RunError, UserError
from grpo.rollout import RolloutEngine
from grpo.runs.given import NOTHING
from grpo.runs.partners import Partners, invite
from grpo.tools.generate import Answering, generator_of, loaded, object_of, row_of
from grpo.types import Message, Rollout, Task

Narrator = Callable[[str], object]
"""Called with each line of the conversation."""
ALONE = (
    " A prompt alone fills only the column {!r}: if the conversation needs more columns, begin with a row of the run's "
    "data (--row 0), or give the columns as a JSON object instead of the prompt"
)


def converse(
    found: Answering, prompt: str | None, row: int | None, asked: Mapping[str, Any], seed: int, tell: Narrator
) -> Rollout:
    """Let the model talk with the environment and tools of its run, and pass each line to `tell`.

    The conversation begins with `prompt`, which fills the run's template (a JSON object also gives the environment
    further columns), or with a `row` of the run's data. `asked` are fields of `Sampling` that override the run's;
    `seed` seeds all draws, including the environment's. Raises UserError for arguments that do not fit, and RunError
    for a conversation that failed, after showing all of it.
    """
    if (prompt is None) == (row is None):
        raise UserError("give either a prompt, or --row with the number of a row of the run's data")
    assert found.rollout is not None
    rows = [_row(found, row)] if prompt is None else []
    with closing(invite(found.conversations, found.tools, NOTHING, 1)) as partners:
        model, tokenizer = loaded(found)
        generator = generator_of(found, model, tokenizer)
        shown = partners.tools, partners.resets, partners.are_agents
        renderer = PromptRenderer(found.data, tokenizer, generator.decoding.vocabulary, "data", *shown)
        columns = rows[0] if prompt is None else _columns(prompt, renderer)
        task = renderer.task(row or 0, columns)
        if task is None:
            raise UserError(f"--row {row}: the row has no prompt")
        _check(partners, task)
        environment, _ = partners.environment(tokenizer, renderer, task, found.rollout, seed, model=found.model.name)
        told = _Told(tell)
        if isinstance(environment, Conversations):
            environment.tables = {name: replace(table, tell=told) for name, table in environment.tables.items()}
        sampling = replace(found.sampling, **{name: value for name, value in asked.items() if name != "temperature"})
        engine = RolloutEngine(generator, sampling, environment)
        at = asked.get("temperature", 0.0)
        ((rollout,),) = (
            group.rollouts for group in engine.rollout([task], 1, at, derive_key(seed, "generate"), logprobs=False)
        )
    told.end(task, rollout)
    if (talk := rollout.trajectory.conversation) is not None and talk.failure is not None:
        alone = prompt is not None and len(columns) == 1
        raise RunError(f"the conversation failed: see above.{ALONE.format(*columns) if alone else ''}")
    return rollout


class _Told:
    """Passes on the prompt once, and then each new message."""

    def __init__(self, tell: Narrator) -> None:
        self._tell, self._begun = tell, False

    def __call__(self, prompt: Sequence[Message], messages: Sequence[Message]) -> None:
        if not self._begun:
            self._begun = True
            self._tell(f"prompt: {asked_of(Task(0, list(prompt), (), {}))}")
        for said in said_in(messages):
            for line in said.lines():
                self._tell(line)

    def end(self, task: Task, rollout: Rollout) -> None:
        """Pass on the end of the conversation and its rewards. For agents, and for environments that make whole
        trajectories, pass on the whole conversation."""
        trajectory = rollout.trajectory
        if trajectory.conversation is None:
            self._tell(f"prompt: {asked_of(task)}")
            self._tell(trajectory.text)
            return
        if not self._begun:
            self(trajectory.conversation.prompt, trajectory.conversation.messages)
        given = [reward for reward in trajectory.conversation.turn_rewards if reward is not None]
        if given:
            self._tell(f"(turn rewards: {', '.join(f'{reward:g}' for reward in given)})")
        for line in (line for said in end_of(trajectory) for line in said.lines()):
            self._tell(line)


def _row(found: Answering, row: int | None) -> Mapping[str, Any]:
    rows = NOTHING.rows("data", found.data)
    assert row is not None
    if isinstance(rows, Streamed):
        if (streamed := next(islice(rows.read(), row, None), None)) is None:
            raise UserError(f"--row {row}: the run's data has fewer rows")
        return dict(streamed[1])
    if row >= len(rows):
        raise UserError(f"--row {row}: the run's data has {len(rows):,} rows, numbered from 0")
    return dict(rows[row])


def _columns(prompt: str, renderer: PromptRenderer) -> Mapping[str, Any]:
    """Return the given columns: from JSON, or the one column of the prompt's template."""
    wanted = renderer.columns
    given = object_of(prompt, wanted)
    if given is not None and (renderer.supplied or set(wanted) <= set(given)):
        return given
    return row_of(prompt, wanted)


def _check(partners: Partners, task: Task) -> None:
    try:
        partners.check("the conversation", [task])
    except UserError as error:
        raise UserError(
            f"{error}. Give the columns that it needs as a JSON object instead of the prompt, or begin with a row of "
            "the run's data: --row 0"
        ) from error
