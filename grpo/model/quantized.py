"""Weights in few bits: the ways to quantise them, whether this machine computes with them, and the way back.

A whole number of bits is MLX's affine way: 64 weights share a scale and an offset. `mxfp4` and `mxfp8` are the small
floating point numbers of the OCP Microscaling standard (arXiv 2310.10537), 32 of which share a power of two; of
`nvfp4` 16 share a scale of 8 bits.
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
    """How weights are quantised: numbers that share a scale, bits of a number, and MLX's name of the way."""

    group_size: int
    bits: int
    mode: str = AFFINE

    @property
    def config(self) -> dict[str, Any]:
        """As a model's `config.json` has it."""
        return asdict(self)

    @property
    def arguments(self) -> str:
        """As `mlx_lm.convert` takes it."""
        if self.mode == AFFINE:
            return f"-q --q-bits {self.bits} --q-group-size {self.group_size}"
        return f"-q --q-mode {self.mode}"


FORMATS = {
    "mxfp4": Quantization(32, 4, "mxfp4"),
    "nvfp4": Quantization(16, 4, "nvfp4"),
    "mxfp8": Quantization(32, 8, "mxfp8"),
}


def quantization(asked: int | str, group_size: int = 64) -> Quantization:
    """What `model.quantize` means: a number of bits (in groups of `group_size`), or the name of a format."""
    return FORMATS[asked] if isinstance(asked, str) else Quantization(group_size, asked)


def words(asked: int | str) -> str:
    """`4 bits`, or the name of a format."""
    return asked if isinstance(asked, str) else f"{asked} bits"


class TypedEmbedding(nn.QuantizedEmbedding):  # type: ignore[misc]  # untyped
    """A quantised embedding whose vectors have the dtype `numbers`. (MLX's are bfloat16 whatever the model's is.)"""

    numbers: mx.Dtype

    def __call__(self, x: mx.array) -> mx.array:
        """Token ids `[...]` to vectors `[..., D]`."""
        vectors: mx.array = mx.dequantize(
            self["weight"][x], self["scales"][x], None, self.group_size, self.bits, self.mode, dtype=self.numbers
        )
        return vectors


def type_embeddings(model: nn.Module, dtype: mx.Dtype) -> None:
    """Have embeddings in small floating point numbers give vectors of this dtype: the model then computes in it."""
    for module in model.modules():
        if type(module) is nn.QuantizedEmbedding and module.mode != AFFINE:
            module.__class__ = TypedEmbedding
            module.numbers = dtype


def check_computes(model: nn.Module, name: str, dtype: mx.Dtype) -> None:
    """Raise UserError with MLX's own reason if it cannot compute with the model's small floating point numbers here.

    Not every backend of MLX has every product, or its gradient, in every format.
    """
    small = [module for module in _quantized(model) if module.mode != AFFINE]
    kinds = {(m.mode, isinstance(m, QuantizedSwitchLinear), m.get("global_scale") is not None) for m in small}
    for mode, experts, scaled in sorted(kinds):
        try:
            for rows in (1, 32):
                mx.eval(_tried(mode, experts, scaled, rows, dtype))
        except Exception as error:  # whatever MLX raises
            where = f"this version of MLX on this device ({mx.default_device().type.name})"
            raise UserError(
                f"model {name}: {where} cannot compute with weights in {mode}: {one_line(error)}. Take a copy of the "
                "model in another format, or model.quantize: 4"
            ) from error


def _tried(mode: str, experts: bool, scaled: bool, rows: int, dtype: mx.Dtype) -> list[mx.array]:
    """A small product in a format, the gradient to what is multiplied, and the weights as whole numbers."""
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
    """The modules whose weights are quantised."""
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear)
    return (module for module in model.modules() if isinstance(module, kinds))


def dtype_of(model: nn.Module) -> mx.Dtype:
    """What a model computes in: the dtype of its norms, which are never quantised."""
    norms = (m["weight"].dtype for path, m in model.named_modules() if "norm" in path and "weight" in m)
    return next(norms, mx.float32)


def inputs_of(module: Any) -> int:
    """The numbers in a row of a quantised matrix."""
    return int(module.scales.shape[-1]) * int(module.group_size)


def dequantized(module: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The layer or embedding of a quantised one, its weights of this dtype; any other module as it is."""
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
    """The module quantised as the former one is."""
    more = {"global_scale": True} if former.get("global_scale") is not None else {}
    made: nn.Module = module.to_quantized(group_size=former.group_size, bits=former.bits, mode=former.mode, **more)
    return made
