"""Agents that are programs in any language: started, told by variables and standard input, read, and ended."""

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
    """Starts a command for each completion, in a session of its own, behind a keeper that ends all that it starts.

    It finds OPENAI_BASE_URL, OPENAI_API_KEY and GRPO_SEED among its variables, and the row as one line of JSON in its
    standard input. Its last line on standard output is the reward, as JSON; all else that it writes is passed on.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = tuple(command)

    async def run(self, base_url: str, api_key: str, seed: int) -> str:
        """What its last line says, as `told` writes it. Raises WrongResultError for a program that ends otherwise than
        with exit code 0, and for a last line that is no reward. Where this is cancelled, the program is killed."""
        variables = {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": api_key, "GRPO_SEED": str(seed)}
        lines, complaints = LastLine(partial(_pass_on, 1)), Tail(partial(_pass_on, 2))
        async with _started(self._command, variables, _as_json(self.row)) as (process, said):
            assert process.stderr is not None
            await asyncio.gather(_read(said, lines.feed), _read(process.stderr, complaints.feed), process.wait())
        last = lines.end()
        if process.returncode:
            _pass_on(1, last + b"\n") if last else None
            why = f"its program ended with {child.ending(process.returncode)}"
            raise WrongResultError(f"{why}; it said: {complaints.text}" if complaints.text else why)
        return _reward_in(last)

    def problem(self, columns: Collection[str]) -> str | None:  # noqa: ARG002  a program reads what it likes
        if shutil.which(self._command[0]) is None:
            words = self._command[0].split()
            hint = f". Write each word by itself: {json.dumps([*words, *self._command[1:]])}" if len(words) > 1 else ""
            return f"command: there is no program {self._command[0]!r}{hint}"
        return None


@dataclass(frozen=True, slots=True)
class ProgramAt:
    """A command. What `load` gives makes agents of it."""

    command: tuple[str, ...]

    def load(self) -> Callable[..., Agent]:
        return partial(ProgramAgent, self.command)


class LastLine:
    """Passes on all lines but the last one that is not blank, which it keeps."""

    def __init__(self, pass_on: Callable[[bytes], None]) -> None:
        self._pass_on, self._last, self._partial = pass_on, b"", b""

    def feed(self, part: bytes) -> None:
        *lines, self._partial = (self._partial + part).split(b"\n")
        if len(self._partial) > LONGEST:  # no reward
            lines, self._partial = [*lines, self._partial], b""
        for line in lines:
            self._take(line)

    def end(self) -> bytes:
        """The last line; empty if there is none."""
        self._take(self._partial)
        return self._last

    def _take(self, line: bytes) -> None:
        if line.strip():
            self._pass_on(self._last + b"\n") if self._last else None
            self._last = line


class Tail:
    """Passes everything on, and keeps the end of it."""

    def __init__(self, pass_on: Callable[[bytes], None]) -> None:
        self._pass_on, self._end = pass_on, b""

    def feed(self, part: bytes) -> None:
        self._pass_on(part)
        self._end = (self._end + part)[-4 * TAIL :]  # of UTF-8

    @property
    def text(self) -> str:
        return self._end.decode(errors="replace").strip()[-TAIL:]


@contextlib.asynccontextmanager
async def _started(
    command: Sequence[str], variables: Mapping[str, str], given: bytes
) -> AsyncIterator[tuple[asyncio.subprocess.Process, asyncio.StreamReader]]:
    """A program that reads what is `given`, and what it says. After the block it is over, with all that it started."""
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
            closing.callback(lambda: pipe.abort() if pipe.get_write_buffer_size() else None)  # what it has not read
            pipe.write(given)
            pipe.write_eof()
            yield process, said
        finally:
            process.stdin.close()  # by which the keeper knows
            await process.wait()


async def _read(stream: asyncio.StreamReader, feed: Callable[[bytes], None]) -> None:
    while part := await stream.read(CHUNK):
        feed(part)


def _pass_on(descriptor: int, text: bytes) -> None:
    """Print, as other environments' prints are printed."""
    while text:
        text = text[os.write(descriptor, text) :]


def _reward_in(line: bytes) -> str:
    if not line:
        raise WrongResultError("its program wrote nothing to standard output: the last line is the reward, as JSON")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        _pass_on(1, line + b"\n")
        shown = line.decode(errors="replace").strip()[:80]
        raise WrongResultError(
            f'its last line is no JSON: {shown!r}. Write a number, {{"reward": number}} or null as the last line'
        ) from None
    return told(value)


def _as_json(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, default=_plain, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise WrongResultError(f"the row cannot be given to a program as JSON: {error}") from None


def _plain(value: Any) -> Any:
    """What JSON holds of a date, of an array, of a number of NumPy's."""
    for method in ("isoformat", "tolist"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"it has a value of the type {type(value).__name__}")
