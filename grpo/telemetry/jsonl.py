"""`metrics.jsonl` and `eval.jsonl`: one JSON object a line, flushed as it is written."""

from __future__ import annotations

import json
from pathlib import Path

from grpo.types import EvalMetrics, StepMetrics


class JsonlLogger:
    """Appends each record to its file in the run's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def log(self, record: StepMetrics | EvalMetrics) -> None:
        line: dict[str, object] = {"step": record.step}
        if isinstance(record, EvalMetrics):
            intervals = {f"{name}_interval": list(pair) for name, pair in record.intervals.items()}
            line |= {"n": record.n, **record.values, **intervals}
        else:
            line |= record.values
        name = "eval.jsonl" if isinstance(record, EvalMetrics) else "metrics.jsonl"
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
