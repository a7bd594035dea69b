"""What an environment is given to sample with: a door on the open generator."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

from grpo.environments.driver import Driver
from grpo.environments.mistakes import EnvironmentMistake, token_ids_of
from grpo.environments.scheduler import Result
from grpo.generation.generator import trajectory_of
from grpo.generation.rows import Row, Submission
from grpo.types import Task, Trajectory


class Sampler:
    """Samples one task's group, of which `n` is the size. `tokenizer` is the model's.

    What is drawn depends on the step's key, the task's place in the step, the part, the row and the position alone: not
    on other tasks, nor on what is awaited when.
    """

    def __init__(self, driver: Driver, task: Task, n: int, seed: int, path: tuple[int, ...]) -> None:
        self.n, self.tokenizer = n, driver.tokenizer
        self._driver, self._task, self._seed, self._path = driver, task, seed, path
        self._parts: set[int] = set()
        self.rows: list[Row] = []
        """All that were begun."""

    async def sample(self, prompt_ids: Sequence[int], n: int, part: int = 0) -> list[Trajectory]:
        """`n` answers to the task's prompt, each to its end. See `begin` for `part`."""
        return [await self.ended(row) for row in self.begin(prompt_ids, n, part)]

    def begin(self, prompt_ids: Sequence[int], n: int, part: int = 0, keep: bool = False) -> tuple[Row, ...]:
        """Let `n` rows decode after the task's prompt, without waiting for them.

        With `keep` a row that has ended can be extended, until it is released. An environment that begins rows more
        than once numbers those times by `part`, from 0: rows of the same part and place would draw alike. Raises
        EnvironmentMistake for a part that was begun before, and for a prompt that is not the task's: a group is
        trained on as what followed that.
        """
        if tuple(prompt_ids) != self._task.prompt_ids:
            raise EnvironmentMistake("a row begins after task.prompt_ids: what is to follow them is for `extend`")
        if part in self._parts:
            raise EnvironmentMistake(
                f"part {part} of this task was begun before: its rows would draw the same again; give the next `part`"
            )
        self._parts.add(part)
        driver, path = self._driver, (*self._path, part) if part else self._path
        submission = Submission(prompt_ids, driver.sampling, self._seed, path, n, driver.logprobs, keep)
        rows = driver.engine.submit(submission)
        self.rows += rows
        return rows

    async def ended(self, row: Row) -> Trajectory:
        """What a row has come to, as soon as its turn has ended: all its tokens and their text, of every turn."""
        await self._driver.ended(row)
        return trajectory_of(row)

    async def extend(self, row: Row, token_ids: Sequence[int]) -> Trajectory:
        """Append tokens that were not sampled (a tool's answer, say), sample the next turn, and wait for its end.

        `row.room` says how many tokens fit. Raises EnvironmentMistake if they do not, if the row was not kept or still
        decodes, and for text.
        """
        ids = token_ids_of(token_ids)
        if not row.keep:
            raise EnvironmentMistake(
                "it extends a row that was not kept: begin such rows by sampler.begin(task.prompt_ids, n, keep=True)"
            )
        try:
            self._driver.engine.extend(row, ids)
        except ValueError as error:
            raise EnvironmentMistake(f"it extends a row that cannot be: {error}") from error
        return await self.ended(row)

    def turn_text(self, row: Row) -> str:
        """The text of the last turn alone of a row that has ended, without its stop token or string."""
        return row.stopping.turn_text(row.token_ids)

    def release(self, row: Row) -> None:
        """Free what a kept row holds. What is not released is freed when all rollouts have ended."""
        self._driver.engine.release(row)

    async def gather(self, *coroutines: Coroutine[Any, Any, Result]) -> list[Result]:
        """Let coroutines go on side by side, such as one for each row. Returns their results in order."""
        if wrong := [one for one in coroutines if not isinstance(one, Coroutine)]:
            raise EnvironmentMistake(f"`gather` takes coroutines, as `gather(*list)`, and not {wrong[0]!r:.60}")
        return await self._driver.jobs.gather(coroutines)

    async def outside(self, future: Future[Result]) -> Result:
        """The result of work in another thread or process, such as a tool's; rows go on decoding meanwhile."""
        if not hasattr(future, "add_done_callback"):
            raise EnvironmentMistake(f"`outside` takes a future, as executor.submit(...) gives, and not {future!r:.60}")
        return await self._driver.jobs.outside(future)
