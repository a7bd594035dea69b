"""`python`: a sandboxed interpreter for the model. The manual's page on the sandbox lists the guarantees."""

from __future__ import annotations

from grpo.processes.sandbox import session
from grpo.processes.sandbox.cell import Limits
from grpo.processes.sandbox.runner import missing


class Python:
    """An interpreter for each conversation. Definitions persist between the calls of a conversation.

    It runs in the same sandbox as `python_tests`: no network, and no files of this machine except those of Python
    itself. A call that takes too long or uses too much memory ends the interpreter: the model reads a note about it,
    and the next call gets a new interpreter.
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
        """Set the limits: seconds per call, memory and disk in MB, processes, and characters of a result.

        Set the tool's `timeout` in the recipe higher than `seconds`, because it ends the conversation. Raises
        ValueError if no sandbox is available, unless `unsafe`: then the model's code runs on this machine with only the
        limits.
        """
        if not unsafe and (why := missing()) is not None:
            raise ValueError(
                f"no sandbox: {why}. `kwargs: {{unsafe: true}}` runs the model's code on this machine without one"
            )
        self._most = max_characters
        self._interpreter = session.Interpreter(Limits(seconds, memory_mb, processes, disk_mb), unsafe)

    def reset(self, seed: int = 0, **_: object) -> None:
        """Discard the interpreter: a new conversation gets a new one, whose random numbers start from `seed`."""
        self.close()
        self._interpreter.seed = seed

    def close(self) -> None:
        """End the interpreter at the end of a conversation."""
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
                f"[the interpreter was stopped: {ran.lost}. The next call uses a new one; earlier definitions are lost]"
            )
        return self._shortened("\n".join(part for part in parts if part)) or "[no output]"

    def _shortened(self, text: str) -> str:
        """Return the text, without its middle if it is too long: the end has the value or the error."""
        over = len(text) - self._most
        if over <= 0:
            return text
        half = self._most // 2
        return f"{text[:half]}\n[{over:,} characters left out]\n{text[len(text) - half :]}"
