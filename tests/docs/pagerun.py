"""Runs the code blocks of a manual page in order, in the working directory, and compares what they print.

- A block with a title (`python title="sums.py"`) is written to a file of that name.
- In a `console` block each line that starts with `$ ` is a command. The lines below it are what it prints. `...` stands
  for lines left out, and a line that ends in `...` is only the start of a line.
- A `python` block without a title runs in this process; all such blocks of a page share their names.
- A `pycon` block runs as a doctest, with the same names.
- Other blocks are not run.

An HTML comment above a block changes that:

- `<!-- test: with KEY=VALUE ... -->`: overrides for each `grpo train` of the block, to keep the test short.
- `<!-- test: output varies -->`: run, but do not compare the output.
- `<!-- test: continues -->`: append to the file of that title.
- `<!-- test: not run: REASON -->`: show only.

`with` and `output varies` can be together, with a semicolon between them.

The toy models of the tests are worse than those of the pages, so numbers are compared by their places alone.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parents[2] / "docs" / "pages"
FENCE = re.compile(
    r"(?:<!-- test: (?P<note>[^\n]*) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w*)(?P<rest>[^\n]*)\n(?P<body>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
Run = Callable[..., Any]


@dataclass(frozen=True)
class Block:
    """A fenced block: `title` is its file's name or empty, `note` what the comment above it says."""

    language: str
    title: str
    note: str
    body: str

    @property
    def runs(self) -> bool:
        return not self.note.startswith("not run:")


def blocks(page: str) -> list[Block]:
    """All fenced blocks of `page`, a path below docs/pages."""
    text = (PAGES / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match["rest"])
        lines = [line.removeprefix(match["indent"]) for line in match["body"].splitlines()]
        body = "".join(f"{line}\n" for line in lines)
        found.append(Block(match["language"], title[1] if title else "", match["note"] or "", body))
    return found


def block(page: str, language: str, holds: str = "") -> str:
    """The one block of a page in this language that holds this text."""
    (found,) = (one.body for one in blocks(page) if one.language == language and holds in one.body)
    return found


def commands(body: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block with the lines that it prints. A backslash continues a command."""
    command, printed = "", []
    for line in re.sub(r"\\\n *", "", body).splitlines():
        if line.startswith("$ "):
            if command:
                yield command, printed
            command, printed = line[2:].partition("  #")[0].strip(), []
        else:
            printed.append(line)
    if command:
        yield command, printed


def run_page(page: str, run_cli: Run) -> int:
    """Run the page's blocks in the working directory; the number of blocks that ran. AssertionError if one fails."""
    space: dict[str, Any] = {"__name__": "__main__"}
    ran = 0
    for block in blocks(page):
        if not block.runs:
            continue
        if block.title:
            mode = "a" if block.note == "continues" else "w"
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            with open(block.title, mode, encoding="utf-8") as file:
                file.write(block.body)
        elif block.language == "console":
            run_console(block, run_cli)
        elif block.language == "python":
            exec(compile(block.body, f"<{page}>", "exec"), space)
        elif block.language == "pycon":
            run_doctest(block.body, page, space)
        else:
            continue
        ran += 1
    return ran


def run_doctest(body: str, page: str, space: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(body, space, page, page, 0)
    told: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append, clear_globs=False)
    space |= test.globs
    assert result.failed == 0, "".join(told)


def run_console(block: Block, run_cli: Run) -> None:
    more = block.note.partition(";")[0].removeprefix("with ").split() if block.note.startswith("with ") else []
    for command, printed in commands(block.body):
        code, out = run_command(command, run_cli, more)
        failed = any(line.startswith("grpo: ") for line in printed)
        assert (code != 0) == failed or "output varies" in block.note, f"{command}: exit code {code}\n{out}"
        if "output varies" not in block.note:
            missing = [line for line in printed if not is_among(line, out)]
            assert not missing, f"{command} does not print\n" + "\n".join(missing) + f"\nbut\n{out}"


def run_command(command: str, run_cli: Run, more: list[str]) -> tuple[int, str]:
    """Exit code and all output. `grpo` and `python FILE` run in this process, where the toy models are."""
    words = shlex.split(command)
    if words[0] == "grpo":
        ran = run_cli(*words[1:], *(more if words[1] == "train" else []))
        return ran.code, ran.out + ran.err
    if words[0] == "python" and len(words) == 2:
        return 0, run_script(words[1])
    path = f"{Path(sys.executable).parent}"
    ran = subprocess.run(["bash", "-c", f'PATH="{path}:$PATH"; {command}'], capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


def run_script(name: str) -> str:
    """What a script of the working directory prints. It may import its neighbors."""
    printed, before = io.StringIO(), set(sys.modules)
    sys.path.insert(0, str(Path.cwd()))
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(Path(name).read_text(encoding="utf-8"), name, "exec"), {"__name__": "__main__"})
    finally:
        sys.path.pop(0)
        for neighbor in Path().glob("*.py"):
            if neighbor.stem not in before:
                sys.modules.pop(neighbor.stem, None)
    return printed.getvalue()


def is_among(line: str, out: str) -> bool:
    wanted = skeleton(line)
    if wanted in ("", "..."):
        return True
    there = [skeleton(one) for one in out.splitlines()]
    if wanted.endswith("..."):
        return any(one.startswith(wanted.removesuffix("...")) for one in there)
    return wanted in there


def skeleton(line: str) -> str:
    """A line without its numbers, units, rules and spaces; of a step's line its beginning alone."""
    line = re.sub(r"^(step \d+/\d+).*", r"\1", line.strip())
    line = re.sub(r"-?\d[\d,]*(\.\d+)?(e[-+]?\d+)?( ?(kB|MB|GB|ms|s|min|h)\b)?", "#", line)
    line = re.sub(r"[━┏┳┓┡╇┩└┴┘─]+", "─", line)
    return re.sub(r"\s+", " ", line)
