"""Runs the completion's Python code against the row's tests, in a sandbox."""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpo.processes.sandbox.cell import Limits
from grpo.processes.sandbox.runner import Tally, missing, run_tests
from grpo.scoring.text import texts

CALLS = "group"

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def reward(
    column: str = "tests",
    partial: bool = False,
    seconds: float = 5.0,
    memory_mb: int = 1024,
    processes: int = 32,
    disk_mb: int = 64,
    concurrency: int | None = None,
    unsafe: bool = False,
) -> Callable[..., list[Any]]:
    """1.0 if all tests pass, else 0.0 (`partial`: the fraction of passed tests); None for a row without tests.

    The code is the last fenced block, or else the whole completion. The column has a Python text or a list. A list has
    either Python texts, which can use the code's definitions and raise an exception to fail, or objects
    `{input, output}`, for which the code runs as a program; other tests are a failure. The limits apply to each
    completion. `concurrency` completions run at the same time; by default, as many as there are processors. Set the
    reward's `timeout` high enough for a group in which every completion takes its `seconds`. Without a sandbox on this
    machine, the reward refuses to load, unless `unsafe` is set: then only the limits protect the machine.
    """
    if not unsafe and (why := missing()) is not None:
        raise ValueError(
            f"no sandbox: {why}. `kwargs: {{unsafe: true}}` runs the model's code on this machine without a sandbox"
        )
    limits = Limits(seconds, memory_mb, processes, disk_mb)

    def score(completions: list[Any], log_extra: Callable[[str, list[Any]], None], **columns: Any) -> list[Any]:
        if column not in columns:
            raise ValueError(f"the dataset has no column {column!r}; its columns are {', '.join(columns)}")

        def one(text: str, tests: Any) -> Tally | None:
            return run_tests(_code(text), tests, limits, unsafe) if tests else None

        tests = [_listed(given) for given in columns[column]]
        wrong = [_wrong(given) for given in tests]
        runnable = [[] if error else given for given, error in zip(tests, wrong, strict=True)]
        with ThreadPoolExecutor(concurrency or os.cpu_count() or 1) as threads:
            verdicts = list(threads.map(one, texts(completions), runnable))
        log_extra("python_tests", [verdict and verdict.error for verdict in verdicts])
        scores = [
            verdict and _score(verdict, len(given), partial) for verdict, given in zip(verdicts, tests, strict=True)
        ]
        return [error or score for error, score in zip(wrong, scores, strict=True)]

    return score


def _code(completion: str) -> str:
    blocks = FENCED.findall(completion)
    return str(blocks[-1]) if blocks else completion


def _listed(tests: Any) -> list[Any]:
    return tests if isinstance(tests, list) else [tests] if tests else []


def _wrong(tests: list[Any]) -> Exception | None:
    """The error in the row's tests, which is not the completion's fault; None if the tests are valid."""
    programs = [test for test in tests if isinstance(test, dict)]
    if any(not isinstance(test.get(key), str) for test in programs for key in ("input", "output")):
        return ValueError("a test of a program needs an input and an output, both texts")
    if (programs and len(programs) < len(tests)) or not all(isinstance(test, dict | str) for test in tests):
        return ValueError("tests must be either all Python texts, or all objects with input and output")
    try:
        for test in tests:
            if isinstance(test, str):
                compile(test, "test.py", "exec")
    except (SyntaxError, ValueError) as error:
        return ValueError(f"a test is not valid Python: {error}")
    return None


def _score(verdict: Tally, tests: int, partial: bool) -> float:
    fraction = verdict.passed / tests
    return fraction if partial else float(fraction == 1)


_DOUBLE = ["assert double(2) == 4", "assert double(-1) == -2"]
_ECHO = [{"input": "a b\n", "output": "b a"}, {"input": "1 2", "output": "2 1\n"}]
CASES = [
    {"completion": "```python\ndef double(x):\n    return 2 * x\n```", "tests": _DOUBLE, "score": 1.0},
    {"completion": "def double(x): return 2 * x", "tests": "\n".join(_DOUBLE), "score": 1.0},
    {"completion": "def double(x): return 4", "tests": _DOUBLE, "score": 0.0},
    {"completion": "def double(x): return 4", "tests": _DOUBLE, "kwargs": {"partial": True}, "score": 0.5},
    {"completion": "import os; os._exit(0)", "tests": _DOUBLE, "score": 0.0},
    {"completion": "raise SystemExit(0)", "tests": _DOUBLE, "score": 0.0},
    {"completion": "I cannot.", "tests": _DOUBLE, "score": 0.0},
    {"completion": "while True: pass", "tests": _DOUBLE, "kwargs": {"seconds": 1.0}, "score": 0.0},
    {"completion": "print(*reversed(input().split()))", "tests": _ECHO, "score": 1.0},
    {"completion": "print(input())", "tests": _ECHO, "score": 0.0},
    {"completion": "x = 1", "tests": None, "score": None},
]
