"""The environment for conversations: the model talks with tools and with environments that answer it."""

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
    """Plays all conversations of a group concurrently: a conversation that waits for its environment delays no other.

    The sampled tokens depend only on the row and its environment's answers, not on when the answers come. The exception
    is `rollout_timeout`: where the clock ends a conversation depends on the machine, so a resumed run may differ from
    an uninterrupted run. The clock starts with the first turn, and includes waiting for a slot. A call that is running
    when time is up is abandoned, and `get_reward` is not called after it.

    With tools only, a conversation ends with the first turn that calls no tool. If an environment answers as the user,
    a conversation ends when a step is `done` or answers nothing. It also ends at a limit. After the last turn of
    `max_turns`, the environment still runs the turn's tool calls or its step: the result counts and is recorded, but
    the model does not read it. A call beyond `max_tool_calls` is not run. If an answer leaves no room for another turn
    in `max_completion_length`, it is dropped, and the conversation ends with `length`.
    """

    def __init__(
        self, tables: Mapping[str, Table], seed: int, max_prompt_length: int, system: str | None = None
    ) -> None:
        """Set up the environment.

        `tables` maps values of the column `environment` to tables; the empty name alone stands for all rows. `seed` is
        the run's seed. A conversation fails if its prompt has more than `max_prompt_length` tokens after `reset`.
        `system` is the system message before prompts that are text.
        """
        self.tables, self.seed = dict(tables), seed
        self.max_prompt_length, self.system = max_prompt_length, system
        self.limits: dict[str, int] = {}
        """Limits that replace `max_prompt_length`, by the source of a task."""

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
        except BaseException:  # the conversations will not be scored, so give their seats back here
            for play in plays:
                play.leave()
            raise

    def begin_once(self, task: Task) -> Content | None:
        """Call `reset` once, as for the task's first conversation, and return what it adds to the prompt.

        Raises UserError if `reset` fails, or if the chat template refuses what it adds.
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
        """Return the columns with which `reset` is called."""
        columns = begun_with(task)
        if len(self.tables) > 1 or "" not in self.tables:
            del columns[SELECTED_BY]
        return columns

    def _seed_of(self, task: Task, sample: int) -> int:
        return seed_of(self.seed, task, sample)

    def tail(self, task: Task) -> int:
        """Return how many of a prompt's last tokens belong to each row instead of the group, because later rows of the
        conversation have other tokens there.

        Raises UserError for a prompt that cannot be written again.
        """
        anew = self.table_of(task).anew
        if anew is None:
            return 0
        lasting = anew.lasting(messages_of(task.prompt, self.system), task.prompt_ids)
        return len(task.prompt_ids) - len(lasting)

    def table_of(self, task: Task) -> Table:
        """Return the table of a task. Raises UserError if the column `environment` names no environment."""
        if list(self.tables) == [""]:
            return self.tables[""]
        name = task.columns.get(SELECTED_BY)
        if name not in self.tables:
            known = ", ".join(self.tables)
            raise UserError(
                f"environments: row {task.index} of {task.source} has {name!r} in the column {SELECTED_BY!r}, but the "
                f"recipe has {known}.{did_you_mean(str(name), self.tables)}"
            )
        return self.tables[name]
