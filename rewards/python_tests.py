"""The completion's Python code against the row's tests, in a sandbox."""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpo.scoring.sandbox.run import Limits, Verdict, missing, run_tests
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
    """1.0 where all tests pass, else 0.0 (`partial`: the fraction that passes); None for a row without tests.

    The code is the last fenced block, or else the whole completion. The column holds a text of Python or a list: of
    such texts, which see what the code has defined and raise where they fail, or of `{input, output}`, which the code
    is run on as a program. The limits are for each completion; as many run at once as there are processors, or as
    `concurrency` says. Where there can be no sandbox it refuses, unless `unsafe`: then only the limits hold.
    """
    if not unsafe and (why := missing()) is not None:
        raise ValueError(
            f"no sandbox: {why}. `kwargs: {{unsafe: true}}` runs the model's code on this machine without one"
        )
    limits = Limits(seconds, memory_mb, processes, disk_mb)

    def score(completions: list[Any], log_extra: Callable[[str, list[Any]], None], **columns: Any) -> list[Any]:
        if column not in columns:
            raise ValueError(f"the dataset has no column {column!r}; it has {', '.join(columns)}")

        def one(text: str, tests: Any) -> Verdict | None:
            return run_tests(_code(text), _listed(tests), limits, unsafe) if tests else None

        with ThreadPoolExecutor(concurrency or os.cpu_count() or 1) as threads:
            verdicts = list(threads.map(one, texts(completions), columns[column]))
        log_extra("python_tests", [verdict and verdict.error for verdict in verdicts])
        return [
            None if verdict is None else _score(verdict, len(_listed(tests)), partial)
            for verdict, tests in zip(verdicts, columns[column], strict=True)
        ]

    return score


def _code(completion: str) -> str:
    blocks = FENCED.findall(completion)
    return str(blocks[-1]) if blocks else completion


def _listed(tests: Any) -> list[Any]:
    return tests if isinstance(tests, list) else [tests]


def _score(verdict: Verdict, tests: int, partial: bool) -> float:
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
