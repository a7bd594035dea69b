"""What an environment is given to sample with: a door on the open generator."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import takewhile
from typing import Any

from grpo.backend.random import derive_seed
from grpo.environments.driver import Driver
from grpo.environments.inbox import Inbox
from grpo.environments.mistakes import EnvironmentMistake, token_ids_of
from grpo.environments.scheduler import Result
from grpo.generation.generator import trajectory_of
from grpo.generation.rows import Row, Submission
from grpo.generation.sampling import Sampling
from grpo.types import FinishReason, Task, Trajectory


class Sampler:
    """Samples one task's group, of which `n` is the size. `tokenizer` is the model's.

    `task` is the group's, and `place` its number among the tasks that are sampled together. What is drawn depends on
    the step's key, the task's place in the step, the part, the row and the position alone: not on other tasks, nor on
    what is awaited when.
    """

    def __init__(self, driver: Driver, task: Task, n: int, seed: int, path: tuple[int, ...], place: int = 0) -> None:
        self.n, self.tokenizer, self.task, self.place = n, driver.tokenizer, task, place
        self._driver, self._seed, self._path = driver, seed, path
        self._parts: set[int] = set()
        self._places: dict[Row, tuple[int, int]] = {}
        self._apart: dict[tuple[int, tuple[int, ...]], int] = {}
        self._beside: dict[tuple[int, ...], Row] = {}
        self.rows: list[Row] = []
        """All that were begun."""

    @property
    def sampling(self) -> Sampling:
        """How rows are sampled, unless `begin_apart` says otherwise."""
        return self._driver.sampling

    @property
    def logprobs(self) -> bool:
        """Whether rows have logprobs."""
        return self._driver.logprobs

    @property
    def longest(self) -> int:
        """The limit on a completion's tokens."""
        return self._driver.sampling.max_tokens

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
        if tuple(prompt_ids) != self.task.prompt_ids:
            raise EnvironmentMistake("a row begins after task.prompt_ids: what is to follow them is for `extend`")
        if part in self._parts:
            raise EnvironmentMistake(
                f"part {part} of this task was begun before: its rows would draw the same again; give the next `part`"
            )
        self._parts.add(part)
        path = (*self._path, part) if part else self._path
        return self._submit(Submission(prompt_ids, self._driver.sampling, self._seed, path, n, keep=keep))

    def begin_after(
        self,
        prompts: Sequence[Sequence[int] | None],
        max_turn_tokens: int = 0,
        lasting: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Row, ...]:
        """Let a row decode after each of these prompts, in the place of the task's. Such rows are kept.

        Where there is None in a prompt's place the row is released and stays empty, so that the others draw what they
        would have drawn beside it.

        What all prompts begin with becomes the group's prompt, `task.prompt_ids`, and is shared; of `lasting`, which
        all rows begin with that come later (`begin_anew`), if that is less. The rest is the row's
        own: it is not trained on, and no limit counts it. Raises EnvironmentMistake if rows were begun before, and for
        prompts whose first tokens differ.
        """
        if self._parts:
            raise EnvironmentMistake("rows of this task were begun before, after another prompt")
        given = [prompt for prompt in prompts if prompt is not None]
        shared = common_prefix([*given, *(lasting or ())]) if given else self.task.prompt_ids
        if not shared:
            raise EnvironmentMistake(
                "the prompts of a group begin with different tokens, and one at least must be the same: begin the "
                "dataset's prompt, or the system message, with words that all have"
            )
        self._parts.add(0)
        self.task = replace(self.task, prompt_ids=shared)
        sampling = replace(self._driver.sampling, max_turn_tokens=max_turn_tokens)
        own = [prompt[len(shared) :] if prompt is not None else () for prompt in prompts]
        submission = Submission(shared, sampling, self._seed, self._path, len(own), keep=True, openings=own)
        rows = self._submit(submission)
        for row, prompt in zip(rows, prompts, strict=True):
            if prompt is None:
                self.release(row)
        self._places = {row: (0, place) for place, row in enumerate(rows)}
        return rows

    def begin_anew(self, row: Row, prompt_ids: Sequence[int], max_tokens: int) -> Row:
        """Let a row decode in the place of one that `begin_after` began and that has ended, which is released.

        It follows a prompt of its own, which begins with the group's, and has `max_tokens` at most after that. What it
        draws depends on the place of the former, and on how many there were there before.
        """
        number, place = self._places.pop(row)
        shared, former = self.task.prompt_ids, row.stopping.sampling
        if tuple(prompt_ids[: len(shared)]) != shared:
            raise EnvironmentMistake("a row begins anew after a prompt that does not begin with the group's")
        least = max(0, former.min_tokens - (row.longest - row.opening - max_tokens))
        (begun,) = self._submit(
            Submission(
                shared,
                replace(former, max_tokens=max_tokens, min_tokens=least),
                self._seed,
                (*self._path, number + 1, place),  # longer than the path of any other row
                keep=True,
                openings=[prompt_ids[len(shared) :]],
                beside=row,
            )
        )
        self.release(row)
        self._places[begun] = number + 1, place
        return begun

    def begin_apart(
        self, prompt_ids: Sequence[int], sample: int, sampling: Sampling, n: int = 1, logprobs: bool = False
    ) -> tuple[Row, ...]:
        """Let `n` rows decode after any prompt, for the group's trajectory number `sample`. Such rows are kept.

        What they draw depends on the place of the task, the sample, the prompt, how often it has had that prompt, and
        the position: not on when they begin. Where it is the task's own prompt, for the first time, they draw what a
        row of `begin` would. `logprobs` are computed where the rollout needs them, and if this says so. Rows of equal
        prompts share its keys and values. Once all is known `settle` says what the group's prompt is.
        """
        prompt = tuple(prompt_ids)
        times = self._apart.get((sample, prompt), 0)
        self._apart[sample, prompt] = times + 1
        plain = n == 1 and not times and prompt == self.task.prompt_ids
        digest = derive_seed(0, "prompt", *prompt)
        beside = self._beside.get(prompt)
        rows = self._driver.engine.submit(
            Submission(
                prompt,
                sampling,
                self._seed,
                self._path if plain else (*self._path, sample, times, digest),  # longer than all other rows' paths
                n,
                logprobs=self._driver.logprobs or logprobs,
                keep=True,
                beside=beside if beside is not None and beside.prompt.left else None,
                first=sample if plain else 0,
            )
        )
        self._beside[prompt] = rows[0]
        self.rows += rows
        return rows

    def settle(self, prompts: Iterable[Sequence[int]]) -> bool:
        """Make what all these prompts begin with the group's prompt. Returns whether there is such a beginning."""
        shared = common_prefix(list(prompts))
        if shared:
            self.task = replace(self.task, prompt_ids=shared)
        return bool(shared)

    def _submit(self, submission: Submission) -> tuple[Row, ...]:
        rows = self._driver.engine.submit(replace(submission, logprobs=self._driver.logprobs))
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
        self.go_on(row, token_ids)
        return await self.ended(row)

    def go_on(self, row: Row, token_ids: Sequence[int], sampling: Sampling | None = None) -> None:
        """`extend` without waiting for the turn's end. Another `sampling` may have other rules for the turn."""
        ids = token_ids_of(token_ids)
        if not row.keep:
            raise EnvironmentMistake(
                "it extends a row that was not kept: begin such rows by sampler.begin(task.prompt_ids, n, keep=True)"
            )
        try:
            self._driver.engine.extend(row, ids, sampling)
        except ValueError as error:
            raise EnvironmentMistake(f"it extends a row that cannot be: {error}") from error

    async def turn(self, row: Row, until: float | None = None) -> FinishReason:
        """Why a row's turn ended, as soon as it has. At the moment `until` of `time.monotonic` it is ended for good."""
        return await self._driver.ended(row, until)

    def watch(self, row: Row, told: Callable[[Row], object]) -> None:
        """Have `told` called after each step in which the row got tokens, until its turn has ended."""
        self._driver.watch(row, told)

    def give_up(self, row: Row) -> None:
        """Release a row that is watched, and may decode: nobody is told of it any more."""
        self._driver.give_up(row)

    def inbox(self) -> Inbox[Any]:
        """Where other threads can send things to a coroutine of this rollout."""
        return Inbox(self._driver.jobs)

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

    async def outside(self, future: Future[Result], until: float | None = None) -> Result:
        """The result of work in another thread or process, such as a tool's; rows go on decoding meanwhile.

        Raises TimeIsUpError (`environments.scheduler`) if there is none at the moment `until` of `time.monotonic`.
        """
        if not hasattr(future, "add_done_callback"):
            raise EnvironmentMistake(f"`outside` takes a future, as executor.submit(...) gives, and not {future!r:.60}")
        return await self._driver.jobs.outside(future, until)


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens that all sequences begin with."""
    shared = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False))
    return tuple(tokens[0] for tokens in shared)
