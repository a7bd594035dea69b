"""`python`: an interpreter for a model, in the sandbox. The manual's page on the sandbox has the guarantees."""

from __future__ import annotations

from grpo.processes.sandbox import session
from grpo.processes.sandbox.cell import Limits
from grpo.processes.sandbox.runner import missing


class Python:
    """An interpreter for each conversation: what is defined in a call is there in the next.

    It runs in the sandbox that `python_tests` has: no network, no files of this machine but those of Python itself. A
    call that takes too long, or too much memory, ends the interpreter; the model is told, and the next call has a new
    one. So does the next conversation.
    """

    def __init__(
        self,
        seconds: float = 10.0,
        memory_mb: int = 1024,
        processes: int = 32,
        disk_mb: int = 64,
        max_characters: int = 4000,
        unsafe: bool = False,
    ) -> None:
        """Limits: seconds for each call, memory and disk in MB, processes, and characters of a result.

        The tool's own `timeout` has to be longer than `seconds`: it ends the conversation. Raises ValueError where
        there can be no sandbox, unless `unsafe`: then the model's code runs on this machine with only the limits.
        """
        if not unsafe and (why := missing()) is not None:
            raise ValueError(
                f"no sandbox: {why}. `kwargs: {{unsafe: true}}` runs the model's code on this machine without one"
            )
        self._most = max_characters
        self._interpreter = session.Interpreter(Limits(seconds, memory_mb, processes, disk_mb), unsafe)

    def reset(self, seed: int = 0, **_: object) -> None:
        """A fresh interpreter for a new conversation. Random numbers in it are those of `seed`."""
        self.close()
        self._interpreter.seed = seed

    def close(self) -> None:
        """The conversation is over: nothing of the interpreter is left."""
        self._interpreter.end()

    def python(self, code: str) -> str:
        """
        Runs Python code and returns what it prints, and its last expression's value. What it defines stays defined.

        Args:
            code: The code to run.

        Returns:
            The printed text and the value, or the traceback of an exception.
        """
        ran = self._interpreter.run(code)
        parts = [ran.printed.removesuffix("\n"), ran.value, ran.error]
        if ran.lost is not None:
            parts.append(
                f"[the interpreter was stopped: {ran.lost}. A new one is there; what was defined before is gone]"
            )
        return self._shortened("\n".join(part for part in parts if part)) or "[no output]"

    def _shortened(self, text: str) -> str:
        """The beginning and the end of a text that is too long: the end has the value, or the error."""
        over = len(text) - self._most
        if over <= 0:
            return text
        half = self._most // 2
        return f"{text[:half]}\n[{over:,} characters left out]\n{text[len(text) - half :]}"
