"""Reads adapters from folders, in mlx-lm's format or PEFT's (converted to mlx-lm's)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from grpo.backend.hub import one_line
from grpo.errors import UserError

SavedArrays = dict[str, mx.array]

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
PEFT_WEIGHTS, PEFT_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PEFT_ROOT = "base_model.model."
PEFT_PARTS = {
    ".lora_A.weight": ".lora_a",
    ".lora_B.weight": ".lora_b",
    ".lora_magnitude_vector.weight": ".m",
    ".lora_magnitude_vector": ".m",
}
"""Suffixes of array names in PEFT's file, and mlx-lm's suffixes for them."""
REFUSED = (
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "lora_bias",
    "alora_invocation_tokens",
)
"""PEFT's settings for adapters that are more than one A and one B per layer, with a common rank and scale, applied to
every token."""
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's initializations that change the base's weights: on the original base, such an adapter gives wrong results."""
BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter read from a folder. `kind` is lora, dora or full; the update is `scale` × B A.

    `arrays` are A `[in, rank]` and B `[rank, out]` (for experts, which share an array, `[experts, rank, in]` and
    `[experts, out, rank]`) and DoRA's magnitudes `[out]`, by their paths in the model. `rank` and `scale` are None for
    whole weights, and if the folder has no config.
    """

    kind: str
    rank: int | None
    scale: float | None
    arrays: SavedArrays

    def fitted(self, paths: Collection[str]) -> SavedArrays:
        """The arrays by the model's `paths`.

        Paths differ for multimodal models: mlx-lm wraps the language model in another module; transformers' paths begin
        at the whole model, or at the language model.
        """
        return {next((name for name in _names_of(path) if name in paths), path): a for path, a in self.arrays.items()}

    def section(self, depth: int | None = None) -> dict[str, Any]:
        """The recipe's `adapter` section that fits this adapter. `depth` is the model's number of blocks, if known."""
        places = [match.groups() for path in self.arrays if (match := BLOCK.search(path))]
        blocks = [int(number) for number, _ in places]
        whole = not blocks or (self.kind == "full" and len(places) < len(self.arrays))
        layers = "all" if whole else (min(blocks), max(blocks) + 1)
        shared = {"type": self.kind, "layers": "all" if layers == (0, depth) else layers}
        if self.kind == "full":
            return shared
        targets = tuple(dict.fromkeys(part.rpartition(".")[0] for _, part in places))
        return {**shared, "rank": self.rank, "scale": self.scale, "use_rslora": False, "targets": targets}


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter in mlx-lm's format or PEFT's.

    Raises UserError for a folder without an adapter, for a file that cannot be read, for NaN or infinities in it, and
    for unsupported PEFT settings.
    """
    check_format(folder)
    if (folder / WEIGHTS).is_file():
        return _of_mlx_lm(folder)
    try:
        return _of_peft(folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"adapter {folder}: {CONFIG} is not in PEFT's format: {one_line(error)}") from None


def weights_file(folder: Path) -> Path | None:
    """The file with an adapter's arrays: mlx-lm's, or else PEFT's. None if the folder has neither."""
    return next((file for name in (WEIGHTS, PEFT_WEIGHTS) if (file := folder / name).is_file()), None)


def check_format(folder: Path) -> None:
    """Raise UserError for a folder without an adapter. The message says what the folder holds instead."""
    if weights_file(folder) is not None:
        return
    if (folder / PEFT_PICKLE).is_file():
        why = f"{PEFT_PICKLE} is a pickle, which can run code; save it as safetensors (PEFT's default)"
    elif found := sorted(folder.glob(f"checkpoints/*/{WEIGHTS}")):
        why = f"is a run; name its checkpoint, such as {found[-1].parent}"
    else:
        what = f"not an adapter of mlx-lm or PEFT: the folder has neither {WEIGHTS} nor {PEFT_WEIGHTS}"
        why = what if folder.is_dir() else "there is no such folder"
    raise UserError(f"adapter {folder}: {why}")


def _of_mlx_lm(folder: Path) -> SavedAdapter:
    arrays = _arrays(folder / WEIGHTS)
    if not (folder / CONFIG).is_file():
        return SavedAdapter("lora", None, None, arrays)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config.get("fine_tune_type", "lora")
        if kind == "full":
            return SavedAdapter(kind, None, None, arrays)
        parameters = config["lora_parameters"]
        return SavedAdapter(kind, int(parameters["rank"]), float(parameters["scale"]), arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"adapter {folder}: {CONFIG} is not in mlx-lm's format: {one_line(error)}") from None


def _of_peft(folder: Path) -> SavedAdapter:
    """Read LoRA or DoRA of PEFT. The scale is alpha / r; with `use_rslora`, alpha / √r (arXiv 2312.03732)."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"adapter {folder}: cannot be read: {error.strerror}") from None
    if (odd := _unsupported(config)) is not None:
        raise UserError(
            f"adapter {folder}: PEFT's {odd} is not supported; merge the adapter into its base model, and train that"
        )
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    arrays = {}
    for name, array in _arrays(folder / PEFT_WEIGHTS).items():
        end = next((end for end in PEFT_PARTS if name.endswith(end)), None)
        if end is None or not name.startswith(PEFT_ROOT) or array.ndim > 2:
            raise UserError(f"adapter {folder}: {name} is not PEFT's name for LoRA or DoRA on a linear layer")
        path = name.removeprefix(PEFT_ROOT).removesuffix(end) + PEFT_PARTS[end]
        arrays[path] = array.reshape(-1) if path.endswith(".m") else array.T
    return SavedAdapter("dora" if config.get("use_dora") else "lora", rank, scale, arrays)


def _unsupported(config: dict[str, Any]) -> str | None:
    """The first unsupported PEFT setting, with its value; None if all are supported."""
    if (kind := config["peft_type"]) != "LORA":
        return f"peft_type {kind}"
    if (bias := config.get("bias", "none")) != "none":
        return f"bias {bias}"
    begun = str(config.get("init_lora_weights", True))
    if begun.startswith(CHANGES_THE_BASE):
        return f"init_lora_weights {begun}, which changes the base's weights,"
    return next((f"{name} {config[name]}" for name in REFUSED if config.get(name)), None)


def _arrays(file: Path) -> SavedArrays:
    try:
        arrays: Any = mx.load(str(file))
        mx.eval(arrays)
    except (OSError, RuntimeError) as error:
        raise UserError(f"adapter {file.parent}: cannot be read: {one_line(error)}") from error
    check_finite(arrays.items(), f"adapter {file.parent}")
    return dict(arrays)


def check_finite(arrays: Iterable[tuple[str, mx.array]], what: str) -> None:
    """Raise UserError if an array holds NaN or infinities, which would make the model's outputs meaningless."""
    for path, array in arrays:
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            odd: Any = (~mx.isfinite(array)).sum().item()
            raise UserError(
                f"{what}: {path} has NaN or infinities in {odd:,} of {array.size:,} places: its training diverged. Use "
                "an earlier checkpoint; a lower optim.learning_rate or optim.max_grad_norm prevents divergence"
            )


def _names_of(path: str) -> list[str]:
    """The paths that one of transformers' arrays may have in mlx-lm's model."""
    inside = path.replace("model.language_model.", "language_model.model.", 1)
    return [path, inside, f"language_model.{path}"]
