"""Makes the table of recipes/LONG_COMPLETIONS.md: the longest completion that can be trained, by model and machine.

LoRA of rank 16 on every linear layer, 8 completions of one prompt of 512 tokens, defaults otherwise. Figures are
planned from the models' sizes (`grpo recipes costs RECIPE --memory GB`), and consider only memory: positions count as
scaled. Figures in `lengths.json` were measured and are bold. The file is a list of
`{"model": "8B, 4 bits", "machine": "CUDA 24 GB", "tokens": 24576}`, with any other keys about the measurement.

    python scripts/benchmarks/lengths.py             # prints the table
    python scripts/benchmarks/lengths.py --write     # puts the table into the page
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.model.drawn import config_of
from grpo.model.known import CONFIGS
from grpo.planning.elsewhere import Elsewhere
from grpo.planning.estimate import machine_of
from grpo.planning.machines import GB, Backend, memory_of
from grpo.recipes import recipe_of

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "recipes" / "LONG_COMPLETIONS.md"
MEASURED = HERE / "lengths.json"
BEGIN, END = "<!-- lengths: made by scripts/benchmarks/lengths.py -->", "<!-- lengths: end -->"

EIGHT_B = {key: value for key, value in CONFIGS["mlx-community/Qwen3-8B-4bit"].items() if key != "quantization"}
SHAPES = {
    "0.6B": CONFIGS["Qwen/Qwen3-0.6B"],
    "1.7B": CONFIGS["Qwen/Qwen3-1.7B"],
    "4B": config_of("qwen3-4b"),
    "8B": EIGHT_B,
}
MODELS: dict[str, Mapping[str, Any]] = {
    **SHAPES,
    **{f"{name}, 4 bits": {**config, "quantization": {"group_size": 64, "bits": 4}} for name, config in SHAPES.items()},
    "30B-A3B, 4 bits": CONFIGS["mlx-community/Qwen3-30B-A3B-4bit"],
}
MACHINES: dict[str, tuple[float, Backend]] = {
    **{f"Mac {size} GB": (size, "metal") for size in (16, 24, 36, 64, 128)},
    **{f"CUDA {size} GB": (size, "cuda") for size in (16, 24, 48, 80)},
    "CUDA 141 GB": (141e9 / GB, "cuda"),
}


def planned(model: str, machine: str, **rollout: Any) -> int:
    """The plan's longest completion in tokens; 0 if not even one token fits."""
    config = {**MODELS[model], "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    cfg = recipe_of(
        {
            "model": {"name": model},
            "adapter": {"rank": 16},
            "data": {"source": "none", "max_prompt_length": 512},
            "rewards": [{"use": "math_answer"}],
            "rollout": {"prompts_per_step": 1, "num_generations": 8, "max_completion_length": 1024, **rollout},
            "loss": {"importance_sampling_correction": "token_truncate"},
            "optim": {"steps": 1},
        },
        "lengths.py",
    )
    size, backend = MACHINES[machine]
    return Elsewhere.of(cfg, config, machine_of(memory_of(size, backend), backend, cfg)).lengths.longest()


def rounded(tokens: int) -> str:
    """Tokens rounded down to two digits, which is a plan's precision."""
    unit = 10 ** max(0, len(str(tokens)) - 2)
    return f"{tokens // unit * unit:,}" if tokens else "–"


def measured() -> dict[tuple[str, str], int]:
    """Measured lengths, by model and machine."""
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {(one["model"], one["machine"]): one["tokens"] for one in found}


def table(**rollout: Any) -> str:
    """The lengths as a Markdown table, one row per model."""
    seen = {} if rollout else measured()
    lines = ["| | " + " | ".join(MACHINES) + " |", "|---|" + "---:|" * len(MACHINES)]
    for model in MODELS:
        cells = [
            rounded(planned(model, machine, **rollout))
            + (f" (**{seen[model, machine]:,}**)" if (model, machine) in seen else "")
            for machine in MACHINES
        ]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    parser.add_argument("--kv-bits", type=int, choices=[4, 8], help="bits of keys and values")
    args = parser.parse_args()
    made = table(**({} if args.kv_bits is None else {"kv_bits": args.kv_bits}))
    print(made)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        between = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
        PAGE.write_text(between.sub(lambda _: f"{BEGIN}\n\n{made}\n\n{END}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
