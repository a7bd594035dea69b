"""The environment that lets the model talk with others: tools, and whoever answers it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo.config.data import SELECTED_BY
from grpo.environments.openings import begun_with, messages_of, seed_of, with_added
from grpo.environments.play import Play, Table
from grpo.environments.sampler import Sampler
from grpo.environments.seats import Content
from grpo.errors import UserError, did_you_mean
from grpo.types import Task, Trajectory


class Conversations:
    """Plays all conversations of a group side by side: one that waits for its environment holds nobody up.

    What is sampled depends on nothing but the row and its environment's answers, whenever they come. A conversation
    with a `rollout_timeout` is the exception: where the clock ends it depends on the machine, so that a resumed run may
    differ from an uninterrupted one. The clock runs from the first turn on, waiting for a slot included. A call that is
    under way when time is up is not waited for, and `get_reward` is not asked for then.

    A conversation ends with the turn in which no tool is called, where nobody answers as the user does; when a step
    says that it is `done`, or answers nothing; or at a limit. Tools that are called in the last turn of `max_turns`
    are still run, and a step is still taken: the result counts, is in the messages, and is read by nobody. A call
    beyond `max_tool_calls` is not run. An answer that leaves no room for another turn in `max_completion_length` is
    taken back, and the conversation ends with what it has: `length`.
    """

    def __init__(
        self, tables: Mapping[str, Table], seed: int, max_prompt_length: int, system: str | None = None
    ) -> None:
        """`tables` are by the column `environment`; a single one by the empty name is for all rows.

        `seed` is the run's. A prompt may have `max_prompt_length` tokens after `reset`, or its conversation fails.
        `system` is the message before prompts of text.
        """
        self.tables, self.seed = dict(tables), seed
        self.max_prompt_length, self.system = max_prompt_length, system
        self.limits: dict[str, int] = {}
        """In the place of `max_prompt_length`, by the source of a task."""

    async def rollout(self, task: Task, sampler: Sampler) -> list[Trajectory]:
        table, columns = self.table_of(task), self._columns_of(task)
        prompt = messages_of(task.prompt, self.system)
        plays = [Play(table, seat, sampler, prompt) for seat in table.host.seats(sampler.place, sampler.n)]
        longest = self.limits.get(task.source, self.max_prompt_length)
        try:
            seeds = [self._seed_of(task, i) for i in range(sampler.n)]
            await sampler.gather(*(play.reset(columns, seed, longest) for play, seed in zip(plays, seeds, strict=True)))
            prompts = [play.prompt_ids if play.failure is None else None for play in plays]
            rows = sampler.begin_after(
                prompts, table.limits.max_turn_tokens or 0, [play.lasting for play in plays if play.failure is None]
            )
            return await sampler.gather(*(play.play(row) for play, row in zip(plays, rows, strict=True)))
        except BaseException:  # nobody will score them
            for play in plays:
                play.leave()
            raise

    def begin_once(self, task: Task) -> Content | None:
        """What `reset` adds to the task's prompt: it is called as for the first conversation, and that is all.

        Raises UserError where it fails, or adds what the chat template refuses, and says why.
        """
        table = self.table_of(task)
        (seat,) = table.host.seats(0, 1)
        try:
            reply = seat.reset(self._columns_of(task), self._seed_of(task, 0)).result()
        finally:
            seat.release()
        if reply.kind != "ok":
            raise UserError(reply.error)
        added: Content | None = reply.value
        if added is not None:
            table.chat.prompt_ids(with_added(messages_of(task.prompt, self.system), added))
        return added

    def _columns_of(self, task: Task) -> dict[str, Any]:
        """What `reset` is called with."""
        columns = begun_with(task)
        if len(self.tables) > 1 or "" not in self.tables:
            del columns[SELECTED_BY]
        return columns

    def _seed_of(self, task: Task, sample: int) -> int:
        return seed_of(self.seed, task, sample)

    def tail(self, task: Task) -> int:
        """How many of a prompt's last tokens each completion has for itself, because rows that begin anew have others.

        Raises UserError for a prompt that cannot be written down again.
        """
        anew = self.table_of(task).anew
        if anew is None:
            return 0
        lasting = anew.lasting(messages_of(task.prompt, self.system), task.prompt_ids)
        return len(task.prompt_ids) - len(lasting)

    def table_of(self, task: Task) -> Table:
        """Who sits at the task's conversations. Raises UserError if its column `environment` names nobody."""
        if list(self.tables) == [""]:
            return self.tables[""]
        name = task.columns.get(SELECTED_BY)
        if name not in self.tables:
            known = ", ".join(self.tables)
            raise UserError(
                f"environments: row {task.index} of {task.source} has {name!r} in the column {SELECTED_BY!r}, and "
                f"there is {known}.{did_you_mean(str(name), self.tables)}"
            )
        return self.tables[name]
