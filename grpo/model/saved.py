"""Adapters in folders: mlx-lm's format, and PEFT's read as if it were mlx-lm's."""

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
"""How the name of an array ends in PEFT's file, and in mlx-lm's."""
REFUSED = (
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "lora_bias",
    "alora_invocation_tokens",
)
"""PEFT's settings that make an adapter more than one A and one B a layer, all of one rank and one scale, for every
token."""
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's ways to begin that take something out of the base's weights: on the base as it is such an adapter is wrong."""
BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """What a folder holds: `kind` is lora, dora or full, and the update is `scale` × B A.

    `arrays` are A `[in, rank]` and B `[rank, out]` (of experts, which share an array, `[experts, rank, in]` and
    `[experts, out, rank]`) and DoRA's magnitudes `[out]`, by their paths in the model. Whole weights have neither rank
    nor scale; both are None, too, where no config says them.
    """

    kind: str
    rank: int | None
    scale: float | None
    arrays: SavedArrays

    def fitted(self, paths: Collection[str]) -> SavedArrays:
        """The arrays by those of the model's `paths` that they mean.

        Of models that see, mlx-lm puts a shell around the language model; transformers takes all of the model, or the
        language model alone.
        """
        return {next((name for name in _names_of(path) if name in paths), path): a for path, a in self.arrays.items()}

    def section(self, depth: int | None = None) -> dict[str, Any]:
        """What a recipe's `adapter` section says of it; `depth` is the number of the model's blocks, where known."""
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
    """An adapter in mlx-lm's format or PEFT's.

    Raises UserError for a folder without one, for a file that cannot be read, for NaN or infinities in it, and for what
    of PEFT's cannot be had here.
    """
    check_format(folder)
    if (folder / WEIGHTS).is_file():
        return _of_mlx_lm(folder)
    try:
        return _of_peft(folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"adapter {folder}: {CONFIG} is not as PEFT writes it: {one_line(error)}") from None


def weights_file(folder: Path) -> Path | None:
    """The file with an adapter's arrays, in mlx-lm's format or else in PEFT's; None where there is none."""
    return next((file for name in (WEIGHTS, PEFT_WEIGHTS) if (file := folder / name).is_file()), None)


def check_format(folder: Path) -> None:
    """Raise UserError for a folder that holds no adapter, and say what it holds instead."""
    if weights_file(folder) is not None:
        return
    if (folder / PEFT_PICKLE).is_file():
        why = f"{PEFT_PICKLE} is a pickle, which can run code; save it as safetensors (PEFT's default)"
    elif found := sorted(folder.glob(f"checkpoints/*/{WEIGHTS}")):
        why = f"is a run; name its checkpoint, such as {found[-1].parent}"
    else:
        what = f"not an adapter as mlx-lm or PEFT writes them: it has no {WEIGHTS} and no {PEFT_WEIGHTS}"
        why = f"cannot be read, {what}" if folder.is_dir() else "there is no such folder"
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
        raise UserError(f"adapter {folder}: {CONFIG} is not as mlx-lm writes it: {one_line(error)}") from None


def _of_peft(folder: Path) -> SavedAdapter:
    """LoRA and DoRA on linear layers; the scale is alpha / r, with `use_rslora` alpha / √r (arXiv 2312.03732)."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"adapter {folder}: cannot be read: {error.strerror}") from None
    if (odd := _unsupported(config)) is not None:
        raise UserError(
            f"adapter {folder}: PEFT's {odd} is not supported here; merge it into its base, and train on that"
        )
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    arrays = {}
    for name, array in _arrays(folder / PEFT_WEIGHTS).items():
        end = next((end for end in PEFT_PARTS if name.endswith(end)), None)
        if end is None or not name.startswith(PEFT_ROOT) or array.ndim > 2:
            raise UserError(f"adapter {folder}: its {name} is not LoRA or DoRA on a linear layer, as PEFT names them")
        path = name.removeprefix(PEFT_ROOT).removesuffix(end) + PEFT_PARTS[end]
        arrays[path] = array.reshape(-1) if path.endswith(".m") else array.T
    return SavedAdapter("dora" if config.get("use_dora") else "lora", rank, scale, arrays)


def _unsupported(config: dict[str, Any]) -> str | None:
    """The first setting of PEFT's that this cannot do, with its value."""
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
    """Raise UserError if an array holds NaN or infinities: a model that computes with it answers nonsense."""
    for path, array in arrays:
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            odd: Any = (~mx.isfinite(array)).sum().item()
            raise UserError(
                f"{what}: {path} has NaN or infinities in {odd:,} of {array.size:,} places: its training diverged. Use "
                "an earlier checkpoint; a lower optim.learning_rate or optim.max_grad_norm keeps a run from this"
            )


def _names_of(path: str) -> list[str]:
    """What an array of transformers' may be called in mlx-lm's model."""
    inside = path.replace("model.language_model.", "language_model.model.", 1)
    return [path, inside, f"language_model.{path}"]
