"""Reads from a `config.json` how weights are quantized, in mlx-lm's format or another toolkit's.

mlx-lm's loader decides by the weights (which of them have scales). This module reads the same from the config alone,
for estimates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from grpo.errors import UserError
from grpo.model.quantized import FORMATS, Quantization

KEPT_WHOLE = ("modules_to_not_convert", "ignore", "exclude_modules")
"""Config keys that list modules whose weights are not quantized."""
COMPRESSED = {
    "nvfp4-pack-quantized": FORMATS["nvfp4"],
    "mxfp4-pack-quantized": FORMATS["mxfp4"],
    "pack-quantized": Quantization(32, 4),
}
"""The formats of `compressed-tensors` that mlx-lm can read."""


@dataclass(frozen=True, slots=True)
class Stored:
    """How weights are stored. `settings` is mlx-lm's `quantization`: the common settings, and exceptions by path.

    `whole` are patterns of modules that are not quantized; `embeddings` says whether embeddings are quantized.
    """

    settings: Mapping[str, Any]
    whole: Sequence[str] = ()
    embeddings: bool = True

    def keeps(self, path: str) -> bool:
        """Whether the weights of the module at this path are not quantized."""
        return any(_matches(pattern, path) for pattern in self.whole)


def stored(config: Mapping[str, Any]) -> Stored | None:
    """How the weights of a config's model are stored; None if they are loaded as floating-point numbers.

    Raises UserError for a method that mlx-lm cannot read, or that it loads into layers whose sizes grpo does not know.
    """
    if (own := config.get("quantization")) is not None:
        return Stored(own)
    foreign = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if not foreign:
        return None
    found = _read(foreign)
    whole = [pattern for name in KEPT_WHOLE for pattern in _inner(foreign).get(name) or ()]
    return None if found is None else Stored(found.config, whole, embeddings=False)


def _read(foreign: Mapping[str, Any]) -> Quantization | None:
    """The quantization that mlx-lm's loader uses for another toolkit's settings; None if it dequantizes."""
    method, settings = foreign.get("quant_method"), _inner(foreign)
    match method:
        case "mxfp4" | "mxfp8":
            return FORMATS[method]
        case "fp8":  # mlx-lm dequantizes all kinds except this one
            small = settings.get("scale_fmt") == "ue8m0" and settings.get("weight_block_size") == [32, 32]
            return FORMATS["mxfp8"] if small else None
        case "compressed-tensors" if (kind := settings.get("format")) in COMPRESSED:
            return COMPRESSED[kind]
        case "modelopt" if settings.get("quant_algo") == "NVFP4":
            return Quantization(settings.get("group_size", 16), 4, "nvfp4")
        case "awq" | "gptq":
            return Quantization(settings.get("group_size", 128), settings.get("bits", 4))
    kinds = [str(settings[name]) for name in ("format", "quant_algo") if name in settings]
    raise UserError(
        f"config.json: quantization_config: weights in {' '.join([str(method), *kinds])} are not supported: use a copy "
        "of the model in another format, or an unquantized copy with model.quantize: 4"
    )


def _inner(foreign: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings, which ModelOpt may nest one level deeper."""
    inner: Mapping[str, Any] = foreign.get("quantization", foreign)
    return inner


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches a module's path: a regular expression after `re:`, or else a part of the path, where
    `*` matches anything."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), path) is not None
    return fnmatchcase(path, f"*{pattern}*")
