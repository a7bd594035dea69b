"""Runs a completion's code against tests inside the sandbox. Its source is passed to Python there as text.

Standard input contains the job. The verdict goes to the original standard output.
"""

import json
import os
import subprocess
import sys


def main() -> None:
    job = json.load(sys.stdin)
    write, leave, encode = os.write, os._exit, json.JSONEncoder().encode  # saved before the code can replace them
    verdict = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    run = _program if job["tests"] and isinstance(job["tests"][0], dict) else _assertions
    passed, error = run(job["code"], job["tests"])
    write(verdict, encode({"seal": job["seal"], "passed": passed, "error": error}).encode())
    leave(0)


def _assertions(code: str, tests: list) -> tuple:  # type: ignore[type-arg]
    """Each test is code that raises if it fails. It sees the names that the completion's code has defined."""
    space = {"__name__": "__main__"}
    try:
        exec(compile(code, "completion.py", "exec"), space)
    except BaseException as error:
        return 0, _said(error)
    passed, first = 0, None
    for test in tests:
        try:
            exec(compile(test, "test.py", "exec"), space)
            passed += 1
        except BaseException as error:
            first = first or _said(error)
    return passed, first


def _program(code: str, tests: list) -> tuple:  # type: ignore[type-arg]
    """Each test has an `input` for the program and the `output` that the program must print."""
    with open("completion.py", "w") as file:
        file.write(code)
    passed, first = 0, None
    for test in tests:
        ran = subprocess.run(
            [sys.executable, "-I", "-B", "completion.py"],
            input=test["input"],
            capture_output=True,
            text=True,
            errors="replace",
        )
        if ran.returncode == 0 and ran.stdout.split() == test["output"].split():
            passed += 1
        else:
            first = (
                first or (ran.stderr.strip().splitlines() or ["its output differs from the expected output"])[-1][:500]
            )
    return passed, first


def _said(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:
        return "an exception that cannot be printed"


main()
