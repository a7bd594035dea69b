"""A persistent interpreter, inside the sandbox. Its text is all that a Python there is given.

Standard input is a socket: requests come as lines of JSON, and so do the answers go. What the code prints goes to
standard output and error.
"""

import ast
import json
import linecache
import os
import random
import sys
import traceback
from typing import Any

LONGEST = 1 << 14
"""Characters of a value or of a traceback that are told."""


def main() -> None:
    own, channel = os.getpid(), os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    determine(int(sys.argv.pop()))
    tell(channel, 0, None, None)
    space = {"__name__": "__main__"}
    with os.fdopen(os.dup(channel), "rb") as requests:
        for line in requests:
            request = json.loads(line)
            value, error = run(request["code"], space, f"<call {request['call']}>")
            if os.getpid() != own:  # the code has forked: one answer is enough
                os._exit(0)
            tell(channel, request["call"], value, error)


def determine(seed: int) -> None:
    """Let there be the same random numbers in each run: of `random`, and by its source of entropy of numpy."""
    random.seed(seed)
    random._urandom = random.Random(seed).randbytes  # type: ignore[attr-defined]


def tell(channel: int, call: int, value: str | None, error: str | None) -> None:
    os.write(channel, json.dumps({"call": call, "value": value, "error": error}).encode() + b"\n")


def run(code: str, space: dict[str, Any], name: str) -> tuple[str | None, str | None]:
    """Execute code; the value of its last expression, and the traceback of what it raised, each None if there is none.

    `name` is the file's name in tracebacks.
    """
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    value = error = None
    try:
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), space)
        if isinstance(last, ast.Expr):
            found = eval(compile(ast.Expression(last.value), name, "eval"), space)
            value = None if found is None else repr(found)[:LONGEST]
    except BaseException as raised:
        error = said(raised, name)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # the code has closed or replaced them
        pass
    return value, error


def said(error: BaseException, name: str) -> str:
    """The traceback of an error, without the frames of this file."""
    try:
        frame = error.__traceback__
        while frame is not None and frame.tb_frame.f_code.co_filename != name:
            frame = frame.tb_next
        return "".join(traceback.format_exception(type(error), error, frame)).rstrip()[-LONGEST:]
    except BaseException:
        return "an exception that cannot be printed"


main()
