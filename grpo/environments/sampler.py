"""The environments' interface to the open generator."""

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
    """Samples the group of one task.

    `n` is the size of the group, `tokenizer` the model's tokenizer, and `place` the task's number among the tasks that
    are sampled together. Draws depend only on the step's key, the task's place in the step, the part, the row, and the
    position: not on other tasks, nor on the order in which results are awaited.
    """

    def __init__(self, driver: Driver, task: Task, n: int, seed: int, path: tuple[int, ...], place: int = 0) -> None:
        self.n, self.tokenizer, self.task, self.place = n, driver.tokenizer, task, place
        self._driver, self._seed, self._path = driver, seed, path
        self._parts: set[int] = set()
        self._places: dict[Row, tuple[int, int]] = {}
        self._apart: dict[tuple[int, tuple[int, ...]], int] = {}
        self._beside: dict[tuple[int, ...], Row] = {}
        self.rows: list[Row] = []
        """All rows that were started."""

    @property
    def sampling(self) -> Sampling:
        """How rows are sampled, unless `begin_apart` gets another sampling."""
        return self._driver.sampling

    @property
    def logprobs(self) -> bool:
        """Whether rows have logprobs."""
        return self._driver.logprobs

    @property
    def longest(self) -> int:
        """The maximum number of tokens of a completion."""
        return self._driver.sampling.max_tokens

    async def sample(self, prompt_ids: Sequence[int], n: int, part: int = 0) -> list[Trajectory]:
        """Return `n` finished answers to the task's prompt. See `begin` for `part`."""
        return [await self.ended(row) for row in self.begin(prompt_ids, n, part)]

    def begin(self, prompt_ids: Sequence[int], n: int, part: int = 0, keep: bool = False) -> tuple[Row, ...]:
        """Start `n` rows after the task's prompt, without waiting for them.

        With `keep`, a row that has ended can be extended until it is released. An environment that calls this several
        times passes `part` 0, 1, 2, …: rows of the same part and place would draw the same tokens. Raises
        EnvironmentMistake for a part that was used before, and for a prompt that is not the task's: training takes all
        rows of a group as continuations of the task's prompt.
        """
        if tuple(prompt_ids) != self.task.prompt_ids:
            raise EnvironmentMistake("a row must begin with task.prompt_ids: append further tokens with `extend`")
        if part in self._parts:
            raise EnvironmentMistake(
                f"part {part} of this task has begun already, and its rows would draw the same tokens again: pass the "
                "next number as `part`"
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
        """Start a row after each of these prompts, which replace the task's prompt. The rows are kept.

        The row of a prompt that is None is released immediately and stays empty, so that the other rows draw what they
        would have drawn with it.

        The longest prefix of all prompts becomes the group's prompt, `task.prompt_ids`, and is shared. `lasting` are
        prefixes with which all later rows (`begin_anew`) begin: the group's prompt must be a prefix of these, too. The
        rest of a prompt belongs to its row: it is not trained on, and no limit counts it. Raises EnvironmentMistake if
        rows were started before, and for prompts whose first tokens differ.
        """
        if self._parts:
            raise EnvironmentMistake("rows of this task have begun already, after another prompt")
        given = [prompt for prompt in prompts if prompt is not None]
        shared = common_prefix([*given, *(lasting or ())]) if given else self.task.prompt_ids
        if not shared:
            raise EnvironmentMistake(
                "the prompts of a group must share at least their first token, but begin with different tokens: begin "
                "the dataset's prompt, or the system message, with the same words"
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
        """Replace a row that has ended with a new row, and release the old one. For rows of `begin_after`.

        The new row follows its own prompt, which must begin with the group's prompt, and samples at most `max_tokens`.
        Its draws depend on its place among the rows of `begin_after` and on the number of rows before it in that place.
        """
        number, place = self._places.pop(row)
        shared, former = self.task.prompt_ids, row.stopping.sampling
        if tuple(prompt_ids[: len(shared)]) != shared:
            raise EnvironmentMistake("the prompt of a new row does not begin with the group's prompt")
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
        """Start `n` rows after any prompt, for the group's trajectory number `sample`. The rows are kept.

        Draws depend on the place of the task, the sample, the prompt, how often the sample has used the prompt, and the
        position: not on when the rows start. The first single row after the task's own prompt draws what a row of
        `begin` would draw. `logprobs` are computed if the rollout needs them or if this argument is true. Rows with
        equal prompts share keys and values. Call `settle` with all prompts at the end: it sets the group's prompt.
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
        """Set the group's prompt to the longest common prefix of all prompts. Returns False if there is none."""
        shared = common_prefix(list(prompts))
        if shared:
            self.task = replace(self.task, prompt_ids=shared)
        return bool(shared)

    def _submit(self, submission: Submission) -> tuple[Row, ...]:
        rows = self._driver.engine.submit(replace(submission, logprobs=self._driver.logprobs))
        self.rows += rows
        return rows

    async def ended(self, row: Row) -> Trajectory:
        """Wait until a row's turn has ended, and return its trajectory: the tokens and text of all turns so far."""
        await self._driver.ended(row)
        return trajectory_of(row)

    async def extend(self, row: Row, token_ids: Sequence[int]) -> Trajectory:
        """Append tokens that were not sampled (such as a tool's answer), sample the next turn, and wait for its end.

        At most `row.room` tokens fit. Raises EnvironmentMistake if there are more, if the row was not kept or still
        decodes, and for text instead of token ids.
        """
        self.go_on(row, token_ids)
        return await self.ended(row)

    def go_on(self, row: Row, token_ids: Sequence[int], sampling: Sampling | None = None) -> None:
        """`extend` without waiting for the end of the turn. From this turn on, the row uses `sampling` if it is given;
        it may differ only in the rules for turns."""
        ids = token_ids_of(token_ids)
        if not row.keep:
            raise EnvironmentMistake(
                "it extends a row that was not kept: start it with sampler.begin(task.prompt_ids, n, keep=True)"
            )
        try:
            self._driver.engine.extend(row, ids, sampling)
        except ValueError as error:
            raise EnvironmentMistake(f"it extends a row that cannot be extended: {error}") from error

    async def turn(self, row: Row, until: float | None = None) -> FinishReason:
        """Wait until a row's turn has ended, and return why. At `until` (clock: `time.monotonic`) it is released."""
        return await self._driver.ended(row, until)

    def watch(self, row: Row, told: Callable[[Row], object]) -> None:
        """Call `told(row)` after each step in which the row got tokens, until its turn has ended."""
        self._driver.watch(row, told)

    def give_up(self, row: Row) -> None:
        """Release a watched row, even if it decodes, and stop watching it."""
        self._driver.give_up(row)

    def inbox(self) -> Inbox[Any]:
        """Return a new queue through which other threads can send items to a coroutine of this rollout."""
        return Inbox(self._driver.jobs)

    def turn_text(self, row: Row) -> str:
        """Return the text of only the last turn of a row that has ended, without its stop token or stop string."""
        return row.stopping.turn_text(row.token_ids)

    def release(self, row: Row) -> None:
        """Free the memory of a kept row. Rows that are not released are freed when all rollouts have ended."""
        self._driver.engine.release(row)

    async def gather(self, *coroutines: Coroutine[Any, Any, Result]) -> list[Result]:
        """Run coroutines concurrently, such as one per row. Returns their results in order."""
        if wrong := [one for one in coroutines if not isinstance(one, Coroutine)]:
            raise EnvironmentMistake(f"`gather` takes coroutines, as in `gather(*list)`, but got {wrong[0]!r:.60}")
        return await self._driver.jobs.gather(coroutines)

    async def outside(self, future: Future[Result], until: float | None = None) -> Result:
        """Wait for the result of work in another thread or process, such as a tool's. Other rows keep decoding.

        Raises TimeIsUpError (`environments.scheduler`) if there is no result at `until` (clock: `time.monotonic`).
        """
        if not hasattr(future, "add_done_callback"):
            raise EnvironmentMistake(
                f"`outside` takes a future, as returned by executor.submit(...), but got {future!r:.60}"
            )
        return await self._driver.jobs.outside(future, until)


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the longest common prefix of the sequences."""
    shared = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False))
    return tuple(tokens[0] for tokens in shared)
