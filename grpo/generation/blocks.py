"""The layers of a Llama-like model, read from the model's own modules.

Llama, Mistral, Qwen2, Qwen3 and similar models have the same parts under the same names. Where one input is multiplied
by several matrices, these matrices are joined, so that decoding needs fewer and larger products.
`grpo.generation.decoders` computes the layers. A model with any other part is refused (`Unread`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend.blame import cause
from grpo.backend.device import on_gpu
from grpo.generation.joined import LastSeen, Products, Unread
from grpo.model.head import Head, Unsplit, split_head

PARTS = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "input_layernorm", "post_attention_layernorm",
}  # fmt: skip
"""The modules of a layer that may have parameters."""
MOST_MERGED = 128 * 2**20
"""Limit on the bytes of weight copies with merged adapters. Measured on two cores with rank 16: a step is 1.09 times
as fast with copies of 3 MB (hidden size 128), 1.04 times with 84 MB (512), and no faster with 240 MB (1,024)."""


class Norm:
    """RMS normalization of `[…, D]` by one module, or of `[…, heads, 1, D]` by several modules.

    `weight` is `[D]`; with `repeats`, the number of heads that each module serves, it is `[heads, D]`.
    """

    def __init__(self, modules: Sequence[Any], repeats: Sequence[int] | None = None) -> None:
        """Raises Unread if a module is not an `nn.RMSNorm`, or the modules differ in shape or epsilon."""
        if any(type(module) is not nn.RMSNorm for module in modules):
            raise Unread("this architecture has a norm other than RMSNorm")
        if len({(module.weight.shape, module.eps) for module in modules}) > 1:
            raise Unread("the norms of queries and keys differ in shape or epsilon in this architecture")
        self._modules, self._repeats = modules, repeats
        self._memory = LastSeen()
        self.held: dict[str, mx.array] = {}
        """The weight, under the key `weight`. Always the same dictionary object."""
        self.eps = float(modules[0].eps)
        self.refresh()

    @property
    def weight(self) -> mx.array:
        return self.held["weight"]

    def refresh(self) -> bool:
        """Read the modules' weights again, and return whether they have changed."""
        weights = [module.weight for module in self._modules]
        if not self._memory.changed(weights):
            return False
        if self._repeats is None:
            (self.held["weight"],) = weights
        else:
            self.held["weight"] = mx.stack([w for w, n in zip(weights, self._repeats, strict=True) for _ in range(n)])
        return True

    def __call__(self, x: mx.array) -> mx.array:
        one = self._repeats is None
        normed: mx.array = mx.fast.rms_norm(x, self.weight if one else None, self.eps)
        return normed if one else normed * self.weight[:, None]


@dataclass(frozen=True, slots=True)
class Block:
    """One layer. The weights of `qk_norm` are those of all query heads, then those of all key heads."""

    before_attention: Norm
    before_mlp: Norm
    qkv: Products
    out: Products
    gate_up: Products
    down: Products
    qk_norm: Norm | None


@dataclass(frozen=True, slots=True)
class Blocks:
    """A Llama-like model.

    `frequencies` `[rotary / 2]` fp32 are in radians per position, `width` is the width of a head, and `ends` are the
    modules before and after the layers: the embedding, and the head if its weights are not tied to the embedding.
    """

    embed: nn.Module
    ends: list[nn.Module]
    layers: list[Block]
    norm: Norm
    head: Head
    query_heads: int
    heads: int
    width: int
    scale: float
    frequencies: mx.array
    traditional: bool
    memory: LastSeen

    @property
    def products(self) -> list[Products]:
        return [product for b in self.layers for product in (b.qkv, b.out, b.gate_up, b.down)]

    @property
    def norms(self) -> list[Norm]:
        norms = [norm for b in self.layers for norm in (b.before_attention, b.before_mlp, b.qk_norm) if norm]
        return [*norms, self.norm]

    @property
    def arrays(self) -> list[Any]:
        """All weights of a step, as trees that stay the same objects while the arrays in them are replaced."""
        parts = [tree for product in self.products for tree in (product.joined, product.lora)]
        return [*parts, *(norm.held for norm in self.norms), *self.ends]

    @property
    def _dtypes(self) -> set[mx.Dtype]:
        products = {product.dtype for product in self.products}
        return {norm.weight.dtype for norm in self.norms} | {dtype for dtype in products if dtype is not None}

    def halve(self) -> bool:
        """Prepare for kernels that apply the adapters' B, and return whether the model allows it.

        All weights must have one dtype. No layer may be divided over processes: its result must be summed over the
        processes first, and the kernels do not do that.
        """
        if alike := len(self._dtypes) == 1 and not any(product.divided for product in self.products):
            for product in self.products:
                product.halve()
        return alike

    def merge(self) -> int:
        """Use copies of the matrices with the adapters merged in, if that pays. Returns the bytes of the copies, or 0.

        Two of the three products of a layer with an adapter are only as wide as the adapter's rank, and a CPU is slow
        at them. A GPU has kernels for them. Copies of quantized weights would be as large as full weights, and half
        precision would round most of an adapter away when it is added to the weights.
        """
        copies = sum(product.copied for product in self.products)
        plain = self._dtypes == {mx.float32} and not any(product.quantised for product in self.products)
        if on_gpu() or not plain or copies > MOST_MERGED:
            return 0
        for product in self.products:
            product.merge()
        return copies

    @property
    def train(self) -> bool:
        """Whether the layers' own weights train (not only adapters), or are released during an update."""
        return any(product.train for product in self.products)

    def refresh(self) -> bool:
        """Read the model's arrays again, and return whether more than the adapters has changed."""
        changed = [self.memory.changed([a for end in self.ends for _, a in tree_flatten(end.parameters())])]
        changed += [norm.refresh() for norm in self.norms]
        changed += [product.refresh(self.norm.weight.dtype) for product in self.products]
        mx.eval([product.lora for product in self.products], [norm.weight for norm in self.norms])
        return any(changed)

    def forget(self) -> None:
        """Release the arrays that an update replaces, until the next `refresh`."""
        if self.train:
            self.memory.forget()
        for product in self.products:
            product.forget()


def read(model: nn.Module) -> Blocks:
    """The model as blocks. Raises Unread, with the reason, if the model has a part that this file does not know."""
    try:
        return _read(model, split_head(model)[1])
    except Unsplit as reason:
        raise Unread(f"the head cannot be split off: {reason}") from reason
    except Unread:
        raise
    except Exception as error:  # a missing part, or our own error
        raise Unread(cause(error)) from error


def _read(model: nn.Module, head: Head) -> Blocks:
    body = model.model
    layers = [_block(layer) for layer in body.layers]
    attention = body.layers[0].self_attn
    frequencies, traditional = _rotation(attention.rope)
    for other, flag in (_rotation(layer.self_attn.rope) for layer in body.layers):
        if flag != traditional or not mx.array_equal(other, frequencies):
            raise Unread("the layers of this architecture have different rotary embeddings")
    heads, query_heads = int(attention.n_kv_heads), int(attention.n_heads)
    width = sum(layers[0].qkv.outs[:1]) // query_heads
    scale = float(attention.scale)
    norm = Norm([body.norm])
    ends = [body.embed_tokens, *([model.lm_head] if "lm_head" in model else [])]
    return Blocks(
        body.embed_tokens,
        ends,
        layers,
        norm,
        head,
        query_heads,
        heads,
        width,
        scale,
        frequencies,
        traditional,
        LastSeen(),
    )


def _block(layer: Any) -> Block:
    unknown = {path for path, _ in tree_flatten(layer.parameters()) if not _known(path)}
    if unknown:
        raise Unread(f"this architecture has parts that Llama does not have: {', '.join(sorted(unknown))}")
    attention, mlp = layer.self_attn, layer.mlp
    return Block(
        before_attention=Norm([layer.input_layernorm]),
        before_mlp=Norm([layer.post_attention_layernorm]),
        qkv=Products([attention.q_proj, attention.k_proj, attention.v_proj]),
        out=Products([attention.o_proj]),
        gate_up=Products([mlp.gate_proj, mlp.up_proj]),
        down=Products([mlp.down_proj]),
        qk_norm=_qk_norm(attention),
    )


def _known(path: str) -> bool:
    # A table of rotary frequencies is not a parameter, although MLX lists it.
    return any(path.startswith(f"{part}.") for part in PARTS) or path.startswith("self_attn.rope.")


def _qk_norm(attention: Any) -> Norm | None:
    if "q_norm" not in attention:
        return None
    return Norm([attention.q_norm, attention.k_norm], [attention.n_heads, attention.n_kv_heads])


def _rotation(rope: Any) -> tuple[mx.array, bool]:
    """Radians per position for each pair of a head's numbers, and whether pairs are adjacent (`traditional`)."""
    if isinstance(rope, nn.RoPE):
        exponents = mx.arange(0, rope.dims, 2, dtype=mx.float32) / rope.dims
        return rope.scale * mx.power(rope.base, -exponents), bool(rope.traditional)
    if type(rope).__name__ == "Llama3RoPE":
        return 1.0 / rope._freqs, bool(rope.traditional)
    raise Unread(f"this architecture has a rotary embedding of another kind: {type(rope).__name__}")
