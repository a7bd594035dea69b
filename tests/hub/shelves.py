"""The datasets that the recipes name, as the Hub has them, with a few rows each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = Sequence[Mapping[str, Any]]
FEW = range(1, 9)


def _sums(sentence: str) -> Rows:
    return [{"prompt": f"{sentence} {n}+{n}?", "solution": str(2 * n)} for n in FEW]


def _verl(name: str) -> Rows:
    """verl's columns: a chat prompt, and the answer inside of another."""
    return [
        {
            "data_source": name,
            "prompt": [{"role": "user", "content": f"What is {n}+{n}? End with a line Answer: $Answer."}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(2 * n), "style": "rule"},
            "extra_info": {"index": str(n)},
        }
        for n in FEW
    ]


PROBLEMS = [
    {
        "task_id": n,
        "text": f"Write a function add_{n} that adds {n} to a number.",
        "code": f"def add_{n}(x):\r\n    return x + {n}",
        "test_list": [f"assert add_{n}(1) == {n + 1}", f"assert add_{n}(0) == {n}", f"assert add_{n}(-{n}) == 0"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for n in FEW
]
SCHEMAS = [
    {"json_schema": '{"type": "object", "properties": {"name": {"type": "string"}}}', "unique_id": f"o{n}"} for n in FEW
]
OPEN = [{"prompt": [{"role": "user", "content": f"Tell me about the number {n}."}]} for n in FEW]
COUNTDOWN = [{"target": n + 3, "nums": [n, 1, 2]} for n in range(2020)]

DATASETS: Mapping[str, Mapping[tuple[str, str], Rows]] = {
    "open-r1/DAPO-Math-17k-Processed": {("en", "train"): _sums("What is"), ("cn", "train"): _sums("什么是")},
    "BytedTsinghua-SIA/DAPO-Math-17k": {("default", "train"): _verl("math_dapo")},
    "BytedTsinghua-SIA/AIME-2024": {("default", "train"): _verl("aime")},
    "google-research-datasets/mbpp": {("full", split): PROBLEMS for split in ("train", "test", "validation")},
    "epfl-dlab/JSONSchemaBench": {("Github_easy", split): SCHEMAS for split in ("train", "val", "test")},
    "trl-lib/ultrafeedback-prompt": {("default", split): OPEN for split in ("train", "test")},
    "Jiayi-Pan/Countdown-Tasks-3to4": {("default", "train"): COUNTDOWN},
}
"""By name: the rows of each config and split."""


def write(splits: Mapping[tuple[str, str], Rows], folder: Path) -> Path:
    """A dataset's folder: a card that names its configs, and a parquet file for each split. Returns the folder."""
    header = ["---", "configs:"]
    for config in dict.fromkeys(config for config, _ in splits):
        header += [f"- config_name: {config}", "  data_files:"]
        for split in (split for other, split in splits if other == config):
            header.append(f"  - {{split: {split}, path: {config}/{split}-*}}")
            (folder / config).mkdir(parents=True, exist_ok=True)
            table = pa.Table.from_pylist(list(splits[config, split]))
            pq.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("\n".join([*header, "---", "# Rows for a test", ""]), encoding="utf-8")
    return folder
