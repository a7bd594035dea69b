"""Quantized weights: formats, a check that this machine computes with them, and dequantization.

A number of bits means MLX's affine format: 64 weights share a scale and an offset. `mxfp4` and `mxfp8` are the small
floating-point formats of the OCP Microscaling standard (arXiv 2310.10537), where 32 weights share a power of two. In
`nvfp4`, 16 weights share an 8-bit scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.hub import one_line
from grpo.errors import UserError
from grpo.model.mlxlm import MultiLinear, QuantizedMultiLinear, QuantizedSwitchLinear, SwitchLinear

AFFINE = "affine"


@dataclass(frozen=True, slots=True)
class Quantization:
    """A quantization: the numbers that share a scale, the bits of a number, and MLX's name for the format."""

    group_size: int
    bits: int
    mode: str = AFFINE

    @property
    def config(self) -> dict[str, Any]:
        """The entries for a model's `config.json`."""
        return asdict(self)

    @property
    def arguments(self) -> str:
        """The arguments for `mlx_lm.convert`."""
        if self.mode == AFFINE:
            return f"-q --q-bits {self.bits} --q-group-size {self.group_size}"
        return f"-q --q-mode {self.mode}"


FORMATS = {
    "mxfp4": Quantization(32, 4, "mxfp4"),
    "nvfp4": Quantization(16, 4, "nvfp4"),
    "mxfp8": Quantization(32, 8, "mxfp8"),
}


def quantization(setting: int | str, group_size: int = 64) -> Quantization:
    """The quantization for `model.quantize`: a number of bits (in groups of `group_size`), or a format's name."""
    return FORMATS[setting] if isinstance(setting, str) else Quantization(group_size, setting)


def words(setting: int | str) -> str:
    """`model.quantize` for messages: `4 bits`, or the name of a format."""
    return setting if isinstance(setting, str) else f"{setting} bits"


class TypedEmbedding(nn.QuantizedEmbedding):  # type: ignore[misc]  # untyped
    """A quantized embedding whose vectors have the dtype `numbers`. (MLX's are always bfloat16.)"""

    numbers: mx.Dtype

    def __call__(self, x: mx.array) -> mx.array:
        """Token ids `[...]` to vectors `[..., D]`."""
        vectors: mx.array = mx.dequantize(
            self["weight"][x], self["scales"][x], None, self.group_size, self.bits, self.mode, dtype=self.numbers
        )
        return vectors


def type_embeddings(model: nn.Module, dtype: mx.Dtype) -> None:
    """Make embeddings in small floating-point formats return vectors of this dtype, so the model computes in it."""
    for module in model.modules():
        if type(module) is nn.QuantizedEmbedding and module.mode != AFFINE:
            module.__class__ = TypedEmbedding
            module.numbers = dtype


def check_computes(model: nn.Module, name: str, dtype: mx.Dtype) -> None:
    """Raise UserError, with MLX's reason, if this machine cannot compute with the model's floating-point format.

    Not every MLX backend has every product, or its gradient, in every format.
    """
    small = [module for module in _quantized(model) if module.mode != AFFINE]
    kinds = {(m.mode, isinstance(m, QuantizedSwitchLinear), m.get("global_scale") is not None) for m in small}
    for mode, experts, scaled in sorted(kinds):
        try:
            for rows in (1, 32):
                mx.eval(_tried(mode, experts, scaled, rows, dtype))
        except Exception as error:  # MLX may raise anything
            where = f"this version of MLX on this device ({mx.default_device().type.name})"
            raise UserError(
                f"model {name}: {where} cannot compute with weights in {mode}: {one_line(error)}. Use a copy of the "
                "model in another format, or model.quantize: 4"
            ) from error


def _tried(mode: str, experts: bool, scaled: bool, rows: int, dtype: mx.Dtype) -> list[mx.array]:
    """A small product in a format, the gradient of its input, and the dequantized weights."""
    weight, scales, *_ = mx.quantize(mx.ones((2, 64, 512) if experts else (64, 512)), mode=mode)
    x = mx.ones((rows, 1, 512) if experts else (rows, 512), dtype)

    def product(x: mx.array) -> mx.array:
        if not experts:
            return mx.quantized_matmul(x, weight, scales, mode=mode)
        of_experts = mx.ones((2,)) if scaled else None
        chosen = mx.zeros((rows,), mx.uint32)
        return mx.gather_qmm(x, weight, scales, rhs_indices=chosen, mode=mode, global_scale=of_experts)

    made, slopes = mx.vjp(product, [x], [mx.ones((rows, 1, 64) if experts else (rows, 64), dtype)])
    return [*made, *slopes, mx.dequantize(weight, scales, mode=mode, dtype=dtype)]


def _quantized(model: nn.Module) -> Iterator[Any]:
    """The modules with quantized weights."""
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear)
    return (module for module in model.modules() if isinstance(module, kinds))


def dtype_of(model: nn.Module) -> mx.Dtype:
    """The dtype that a model computes in: that of its norms, which are never quantized."""
    norms = (m["weight"].dtype for path, m in model.named_modules() if "norm" in path and "weight" in m)
    return next(norms, mx.float32)


def inputs_of(module: Any) -> int:
    """Number of inputs of a quantized layer, unpacked."""
    return int(module.scales.shape[-1]) * int(module.group_size)


def dequantized(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """A quantized layer or embedding as a plain one, with weights in this dtype. Other modules are returned as is."""
    weight_of = {
        nn.QuantizedLinear: lambda outputs, inputs: nn.Linear(inputs, outputs, bias="bias" in module),
        nn.QuantizedEmbedding: nn.Embedding,
        QuantizedSwitchLinear: lambda n, outputs, inputs: SwitchLinear(inputs, outputs, n, bias="bias" in module),
        QuantizedMultiLinear: lambda heads, outputs, inputs: MultiLinear(inputs, outputs, heads),
    }
    make = next((make for kind, make in weight_of.items() if isinstance(module, kind)), None)
    if make is None:
        return module
    weight = _whole(module, dtype)
    made: nn.Module = make(*weight.shape)
    made.weight = weight
    if "bias" in module:
        made.bias = module.bias
    return made


def _whole(module: Any, dtype: mx.Dtype) -> mx.array:
    how = module.group_size, module.bits, module.mode
    weight, scales, offsets = module["weight"], module["scales"], module.get("biases")
    if (of_experts := module.get("global_scale")) is None:
        return mx.dequantize(weight, scales, offsets, *how, dtype=dtype)
    each = zip(weight, scales, of_experts, strict=True)
    return mx.stack([mx.dequantize(w, s, None, *how, global_scale=g, dtype=dtype) for w, s, g in each])


def quantized_like(module: Any, former: Any) -> nn.Module:
    """The module, quantized in the same way as `former`."""
    more = {"global_scale": True} if former.get("global_scale") is not None else {}
    made: nn.Module = module.to_quantized(group_size=former.group_size, bits=former.bits, mode=former.mode, **more)
    return made
