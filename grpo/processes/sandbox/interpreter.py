"""A persistent interpreter inside the sandbox. Its source is passed to Python there as text.

Standard input is a socket: requests and answers are lines of JSON. The code's output goes to standard output and
standard error.
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
"""Most characters of a value or a traceback in an answer."""


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
            if os.getpid() != own:  # a fork of the code: only the original process answers
                os._exit(0)
            tell(channel, request["call"], value, error)


def determine(seed: int) -> None:
    """Make the random numbers of `random` reproducible, and through its entropy source those of numpy."""
    random.seed(seed)
    random._urandom = random.Random(seed).randbytes  # type: ignore[attr-defined]


def tell(channel: int, call: int, value: str | None, error: str | None) -> None:
    os.write(channel, json.dumps({"call": call, "value": value, "error": error}).encode() + b"\n")


def run(code: str, space: dict[str, Any], name: str) -> tuple[str | None, str | None]:
    """Execute code. Returns the value of its last expression, and the traceback of its exception, each or None.

    `name` is the file name in tracebacks.
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
