"""How a `config.json` says that weights are stored in few bits: in mlx-lm's words, and in those of other toolkits.

mlx-lm's loader decides by the weights themselves (which of them have scales); this reads the same from the config
alone, for estimates.
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
"""Under which a config lists modules whose weights are stored as they are."""
COMPRESSED = {
    "nvfp4-pack-quantized": FORMATS["nvfp4"],
    "mxfp4-pack-quantized": FORMATS["mxfp4"],
    "pack-quantized": Quantization(32, 4),
}
"""The formats of `compressed-tensors` that mlx-lm reads."""


@dataclass(frozen=True, slots=True)
class Stored:
    """How weights are stored. `settings` is mlx-lm's `quantization`: of all, and of paths that have their own.

    `whole` are patterns of modules that are not quantised; `embeddings`: whether embeddings are.
    """

    settings: Mapping[str, Any]
    whole: Sequence[str] = ()
    embeddings: bool = True

    def keeps(self, path: str) -> bool:
        """Whether the weights of the module at this path are stored as they are."""
        return any(_matches(pattern, path) for pattern in self.whole)


def stored(config: Mapping[str, Any]) -> Stored | None:
    """How a config says that its weights are stored; None where they are loaded as floating point numbers.

    Raises UserError for a method that mlx-lm does not read, or reads into layers whose sizes are not known here.
    """
    if (own := config.get("quantization")) is not None:
        return Stored(own)
    theirs = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if not theirs:
        return None
    found = _read(theirs)
    whole = [pattern for name in KEPT_WHOLE for pattern in _inner(theirs).get(name) or ()]
    return None if found is None else Stored(found.config, whole, embeddings=False)


def _read(theirs: Mapping[str, Any]) -> Quantization | None:
    """What other toolkits' settings mean, as mlx-lm's loader reads them."""
    method, settings = theirs.get("quant_method"), _inner(theirs)
    match method:
        case "mxfp4" | "mxfp8":
            return FORMATS[method]
        case "fp8":  # mlx-lm makes floating point numbers of all but one kind
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
        f"config.json: quantization_config: weights in {' '.join([str(method), *kinds])} are not reckoned with: take a "
        "copy of the model in another format, or without quantisation and with model.quantize: 4"
    )


def _inner(theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings themselves, which ModelOpt may nest."""
    inner: Mapping[str, Any] = theirs.get("quantization", theirs)
    return inner


def _matches(pattern: str, path: str) -> bool:
    """Whether a module is meant: by a regular expression after `re:`, or by a part of its path, `*` being anything."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), path) is not None
    return fnmatchcase(path, f"*{pattern}*")
