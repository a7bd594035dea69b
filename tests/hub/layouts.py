"""Folders as the Hub's repositories have them: a model in several files of weights, a dataset of several configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pyarrow as pa
import pyarrow.parquet as pq

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
POSITIONS = 40_960
"""As Qwen3 has, and enough for every recipe: the toy has fewer than dapo-math asks for."""
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
  - {split: test, path: socratic/test-*}
---
# Sums in words
"""


def sharded_model(source: Path, folder: Path, jinja: bool = False) -> Path:
    """A copy of a model, laid out as Qwen3 is: two shards and their index, two stop tokens, defaults of sampling.

    `jinja`: with the chat template in a file of its own. Returns the folder.
    """
    shutil.copytree(source, folder)
    _shard(folder)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    special = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in special}
    stops = [ids[tokenizer["eos_token"]], ids[tokenizer["pad_token"]]]
    defaults = {**SAMPLING, "eos_token_id": stops, "pad_token_id": stops[1]}
    _write(folder / "generation_config.json", defaults)
    _write(folder / "config.json", {**config, "torch_dtype": "bfloat16", "max_position_embeddings": POSITIONS})
    if jinja:
        (folder / "chat_template.jinja").write_text(tokenizer.pop("chat_template"))
        _write(folder / "tokenizer_config.json", tokenizer)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return folder


def _shard(folder: Path) -> None:
    whole = folder / "model.safetensors"
    weights = {name: array.astype(mx.bfloat16) for name, array in mx.load(str(whole)).items()}
    names, half = sorted(weights), len(weights) // 2
    index = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in part}, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    whole.unlink()
    size = sum(array.nbytes for array in weights.values())
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})


def gsm8k(folder: Path, rows: int = 12) -> Path:
    """Questions and worked answers as GSM8K has them: two configs, two splits, parquet, named in the card's header."""
    for config in ("main", "socratic"):
        (folder / config).mkdir(parents=True)
        for split, first in (("train", 0), ("test", rows)):
            numbers = range(first, first + rows)
            table = pa.table(
                {
                    "question": [f"Ann has {n} apples and buys {n + 1} more. How many has she?" for n in numbers],
                    "answer": [
                        f"She has {n} + {n + 1} = <<{n}+{n + 1}={2 * n + 1}>>{2 * n + 1}.\n#### {2 * n + 1}"
                        for n in numbers
                    ],
                }
            )
            pq.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD)
    return folder


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2))
