"""Agents that are programs in any language. Input: variables and standard input; output: the last printed line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from grpo.environments.agent import Agent, told
from grpo.environments.results import LONGEST, WrongResultError
from grpo.processes import child
from grpo.processes.output import TAIL

KEEPER = Path(child.__file__).with_name("keeper.py")
CHUNK = 1 << 16


class ProgramAgent(Agent):
    """Starts a command for each completion, in its own process session, with a keeper that ends all its processes.

    The program gets OPENAI_BASE_URL, OPENAI_API_KEY and GRPO_SEED as environment variables, and the row as one line of
    JSON on standard input. Its last line on standard output is the reward, as JSON; its other output is passed on.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = tuple(command)

    async def run(self, base_url: str, api_key: str, seed: int) -> str:
        """Run the program and return the reward in its last line, as `told` writes it.

        Raises WrongResultError if the exit code is not 0, or if the last line is not a reward. Canceling this call
        kills the program.
        """
        variables = {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": api_key, "GRPO_SEED": str(seed)}
        lines, complaints = LastLine(partial(_pass_on, 1)), Tail(partial(_pass_on, 2))
        async with _started(self._command, variables, _as_json(self.row)) as (process, said):
            assert process.stderr is not None
            await asyncio.gather(_read(said, lines.feed), _read(process.stderr, complaints.feed), process.wait())
        last = lines.end()
        if process.returncode:
            _pass_on(1, last + b"\n") if last else None
            why = f"its program ended with {child.ending(process.returncode)}"
            raise WrongResultError(f"{why}; it printed: {complaints.text}" if complaints.text else why)
        return _reward_in(last)

    def problem(self, columns: Collection[str]) -> str | None:  # noqa: ARG002  a program may read any columns
        if shutil.which(self._command[0]) is None:
            words = self._command[0].split()
            split = json.dumps([*words, *self._command[1:]])
            hint = f". Write each word as a separate item: {split}" if len(words) > 1 else ""
            return f"command: there is no program {self._command[0]!r}{hint}"
        return None


@dataclass(frozen=True, slots=True)
class ProgramAt:
    """A command. `load` returns a maker of agents that run it."""

    command: tuple[str, ...]

    def load(self) -> Callable[..., Agent]:
        return partial(ProgramAgent, self.command)


class LastLine:
    """Passes on all nonblank lines except the last, which it keeps."""

    def __init__(self, pass_on: Callable[[bytes], None]) -> None:
        self._pass_on, self._last, self._partial = pass_on, b"", b""

    def feed(self, part: bytes) -> None:
        *lines, self._partial = (self._partial + part).split(b"\n")
        if len(self._partial) > LONGEST:  # too long for a reward
            lines, self._partial = [*lines, self._partial], b""
        for line in lines:
            self._take(line)

    def end(self) -> bytes:
        """Return the last nonblank line; empty if there is none."""
        self._take(self._partial)
        return self._last

    def _take(self, line: bytes) -> None:
        if line.strip():
            self._pass_on(self._last + b"\n") if self._last else None
            self._last = line


class Tail:
    """Passes everything on, and keeps the end."""

    def __init__(self, pass_on: Callable[[bytes], None]) -> None:
        self._pass_on, self._end = pass_on, b""

    def feed(self, part: bytes) -> None:
        self._pass_on(part)
        self._end = (self._end + part)[-4 * TAIL :]  # a character has up to 4 bytes in UTF-8

    @property
    def text(self) -> str:
        return self._end.decode(errors="replace").strip()[-TAIL:]


@contextlib.asynccontextmanager
async def _started(
    command: Sequence[str], variables: Mapping[str, str], given: bytes
) -> AsyncIterator[tuple[asyncio.subprocess.Process, asyncio.StreamReader]]:
    """Start a program with `given` as its input. Yields its keeper's process and the program's output.

    When the block ends, the program and all processes that it started are ended.
    """
    loop = asyncio.get_running_loop()
    its_input, our_input = os.pipe()
    our_output, its_output = os.pipe()
    with contextlib.ExitStack() as closing:
        writing, reading = os.fdopen(our_input, "wb", 0), os.fdopen(our_output, "rb", 0)
        closing.callback(writing.close)
        closing.callback(reading.close)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(KEEPER), f"{its_input},{its_output}", "0", *command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(its_input, its_output),
                env={**os.environ, **variables},
                start_new_session=True,
            )
        except OSError as error:  # too many processes or descriptors on this machine
            raise WrongResultError(f"its program cannot be started: {error}") from error
        finally:
            os.close(its_input)
            os.close(its_output)
        assert process.stdin is not None
        try:
            said = asyncio.StreamReader()
            output, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(said), reading)
            closing.callback(output.close)
            pipe, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, writing)
            closing.callback(lambda: pipe.abort() if pipe.get_write_buffer_size() else None)  # drop unread input
            pipe.write(given)
            pipe.write_eof()
            yield process, said
        finally:
            process.stdin.close()  # tells the keeper to end the program
            await process.wait()


async def _read(stream: asyncio.StreamReader, feed: Callable[[bytes], None]) -> None:
    while part := await stream.read(CHUNK):
        feed(part)


def _pass_on(descriptor: int, text: bytes) -> None:
    """Write to this process's output, where other environments' prints go, too."""
    while text:
        text = text[os.write(descriptor, text) :]


def _reward_in(line: bytes) -> str:
    if not line:
        raise WrongResultError(
            "its program wrote nothing to standard output: the last line must be the reward, as JSON"
        )
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        _pass_on(1, line + b"\n")
        shown = line.decode(errors="replace").strip()[:80]
        raise WrongResultError(
            f'its last line is not JSON: {shown!r}. Write a number, {{"reward": number}}, or null as the last line'
        ) from None
    return told(value)


def _as_json(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, default=_plain, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise WrongResultError(f"the row cannot be passed to a program as JSON: {error}") from None


def _plain(value: Any) -> Any:
    """Convert a date, a NumPy array, or a NumPy number to a type that JSON has."""
    for method in ("isoformat", "tolist"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"it has a value of type {type(value).__name__}")
