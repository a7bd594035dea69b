"""What a layer of a Llama-like model computes, read from the model's own modules.

Llama, Mistral, Qwen2, Qwen3 and their like are made of the same parts under the same names. Their weights are taken
from the modules and put together where one input is multiplied by several matrices, so that decoding needs fewer and
larger products; how decoding computes a layer is another file's matter. A model with any other part is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend.blame import cause
from grpo.generation.products import fewest_columns, padded
from grpo.model.head import Head, Unsplit, split_head

PARTS = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "input_layernorm", "post_attention_layernorm",
}  # fmt: skip
"""Everything that may hold parameters in a layer."""
WEIGHTS = ("weight", "scales", "biases", "bias")
"""What a linear layer holds, quantised or not, with a row for each output."""


class Unread(ValueError):
    """Why a model cannot be read as blocks."""


class LastSeen:
    """Remembers arrays, to tell when others have taken their place."""

    def __init__(self) -> None:
        self._held: list[mx.array] = []

    def changed(self, arrays: Sequence[mx.array]) -> bool:
        """Whether these are not the very arrays of the last time."""
        former, self._held = self._held, list(arrays)
        return len(former) != len(arrays) or any(a is not b for a, b in zip(arrays, former, strict=True))

    def forget(self) -> None:
        """Hold none: the next arrays will be others."""
        self._held = []


class Products:
    """Several linear layers of one input as one product, their LoRA as another: `x` `[S, in]` to `[S, sum of outs]`.

    The layers' own weights become views of the joined matrix, so that nothing is held twice.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Raises Unread for a layer that is not linear, or quantised otherwise than its neighbours."""
        self._layers = layers
        self._bases = [layer.linear if "lora_a" in layer else layer for layer in layers]
        kinds = {(type(base), getattr(base, "bits", 0), getattr(base, "group_size", 0)) for base in self._bases}
        if len(kinds) > 1 or not isinstance(self._bases[0], (nn.Linear, nn.QuantizedLinear)):
            raise Unread("the layers of one input are not linear, or not quantised alike")
        if any("m" in layer for layer in layers):
            raise Unread("adapters with magnitudes (DoRA) are not joined")
        if len({"bias" in base for base in self._bases}) > 1:
            raise Unread("only some of the layers of one input have a bias")
        self._joined: dict[str, mx.array] = {}
        self._weights, self._adapters = LastSeen(), LastSeen()
        self.lora: dict[str, mx.array] = {}
        """`a` `[in, ranks]` and `b` `[ranks, sum of outs]` where there are adapters; always the same dictionary."""

    def refresh(self, dtype: mx.Dtype) -> bool:
        """Take over what the layers hold now, and say whether more than adapters has changed."""
        adapters = [layer[name] for layer in self._layers for name in ("lora_a", "lora_b") if name in layer]
        if adapters and self._adapters.changed(adapters):
            self.lora.update(_joined_lora(self._layers, dtype))
        if not self._weights.changed(self._held()):
            return False
        self._join()
        self._weights.changed(self._held())
        return True

    @property
    def train(self) -> bool:
        """Whether the layers' own weights train, and not adapters alone."""
        return any(tree_flatten(base.trainable_parameters()) for base in self._bases)

    def forget(self) -> None:
        """Let go of the joined matrix, until `refresh` makes the next."""
        self._joined = {}
        self._weights.forget()

    def __call__(self, x: mx.array, onto: mx.array | None = None) -> mx.array:
        """The product, added to `onto` if that is given."""
        y = self._base(x, onto)
        if "bias" in self._joined:
            y = y + self._joined["bias"]
        return mx.addmm(y, x @ self.lora["a"], self.lora["b"]) if self.lora else y

    def _base(self, x: mx.array, onto: mx.array | None) -> mx.array:
        weight = self._joined["weight"]
        first = self._bases[0]
        if not isinstance(first, nn.QuantizedLinear):
            return x @ weight.T if onto is None else mx.addmm(onto, x, weight.T)
        y = mx.quantized_matmul(
            x, weight, self._joined["scales"], self._joined.get("biases"),
            transpose=True, group_size=first.group_size, bits=first.bits, mode=first.mode,
        )  # fmt: skip
        return y if onto is None else onto + y

    def _held(self) -> list[mx.array]:
        return [base[name] for base in self._bases for name in WEIGHTS if name in base]

    def _join(self) -> None:
        names = [name for name in WEIGHTS if name in self._bases[0]]
        self._joined = {name: mx.concatenate([base[name] for base in self._bases]) for name in names}
        mx.eval(self._joined)
        start = 0
        for base in self._bases:
            end = start + base.weight.shape[0]
            for name in names:
                base[name] = self._joined[name][start:end]
            start = end
        mx.eval(self._held())


def _joined_lora(layers: Sequence[nn.Module], dtype: mx.Dtype) -> dict[str, mx.array]:
    """A `[in, ranks]` of the layers that have one, and their B, scaled, on the diagonal of `[ranks, outs]`."""
    a = mx.concatenate([layer.lora_a for layer in layers if "lora_a" in layer], axis=1)
    outs = [_outputs(layer) for layer in layers]
    rows = [
        mx.pad(layer.lora_b * layer.scale, [(0, 0), (sum(outs[:i]), sum(outs[i + 1 :]))])
        for i, layer in enumerate(layers)
        if "lora_a" in layer
    ]
    a, b = padded(a, fewest_columns(), 1), padded(mx.concatenate(rows), fewest_columns(), 0)
    return {"a": a.astype(dtype), "b": b.astype(dtype)}


class Norm:
    """Root mean square normalisation of `[…, D]` by one module, or of `[…, heads, 1, D]` by several in turn.

    `weight` is `[D]`, or `[heads, D]` where `repeats` says how many heads each module is for.
    """

    def __init__(self, modules: Sequence[Any], repeats: Sequence[int] | None = None) -> None:
        """Raises Unread for modules that are no `nn.RMSNorm`, or not alike."""
        if any(type(module) is not nn.RMSNorm for module in modules):
            raise Unread("this architecture has another norm than RMSNorm")
        if len({(module.weight.shape, module.eps) for module in modules}) > 1:
            raise Unread("this architecture norms all heads at once")
        self._modules, self._repeats = modules, repeats
        self._memory = LastSeen()
        self.eps = float(modules[0].eps)
        self.refresh()

    def refresh(self) -> bool:
        """Take over the modules' weights, and say whether they have changed."""
        weights = [module.weight for module in self._modules]
        if not self._memory.changed(weights):
            return False
        if self._repeats is None:
            (self.weight,) = weights
        else:
            self.weight = mx.stack([w for w, n in zip(weights, self._repeats, strict=True) for _ in range(n)])
        return True

    def __call__(self, x: mx.array) -> mx.array:
        one = self._repeats is None
        normed: mx.array = mx.fast.rms_norm(x, self.weight if one else None, self.eps)
        return normed if one else normed * self.weight[:, None]


@dataclass(frozen=True, slots=True)
class Block:
    """One layer. `qk_norm` has a weight for each query head, then for each head of keys."""

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

    `frequencies` `[rotary / 2]` fp32 are radians a position, `width` is that of a head, `ends` what holds the weights
    before and behind the layers.
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
    def train(self) -> bool:
        """Whether weights of the layers' own train, and not adapters alone."""
        return any(product.train for product in self.products)

    def refresh(self) -> bool:
        """Take over what the model holds now, and say whether more than adapters has changed."""
        norms = [norm for b in self.layers for norm in (b.before_attention, b.before_mlp, b.qk_norm) if norm]
        changed = [self.memory.changed([a for end in self.ends for _, a in tree_flatten(end.parameters())])]
        changed += [norm.refresh() for norm in (*norms, self.norm)]
        changed += [product.refresh(self.norm.weight.dtype) for product in self.products]
        mx.eval([product.lora for product in self.products], [norm.weight for norm in norms])
        return any(changed)

    def forget(self) -> None:
        """Let go of the model's matrices, until `refresh` takes over the next."""
        self.memory.forget()
        for product in self.products:
            product.forget()


def read(model: nn.Module) -> Blocks:
    """The model as blocks. Raises Unread, with the reason, if it has any part that is not known here."""
    try:
        return _read(model, split_head(model)[1])
    except Unsplit as reason:
        raise Unread(f"the head cannot be split off: {reason}") from reason
    except Unread:
        raise
    except Exception as error:  # a part that is not there, or an error of ours
        raise Unread(cause(error)) from error


def _read(model: nn.Module, head: Head) -> Blocks:
    body = model.model
    layers = [_block(layer) for layer in body.layers]
    attention = body.layers[0].self_attn
    frequencies, traditional = _rotation(attention.rope)
    for other, flag in (_rotation(layer.self_attn.rope) for layer in body.layers):
        if flag != traditional or not mx.array_equal(other, frequencies):
            raise Unread("this architecture's layers rotate differently")
    heads, query_heads = int(attention.n_kv_heads), int(attention.n_heads)
    width = _outputs(attention.q_proj) // query_heads
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
        raise Unread(f"this architecture has other parts than Llama's: {', '.join(sorted(unknown))}")
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
    # A table of rotary frequencies is no parameter, though MLX lists it as one.
    return any(path.startswith(f"{part}.") for part in PARTS) or path.startswith("self_attn.rope.")


def _qk_norm(attention: Any) -> Norm | None:
    if "q_norm" not in attention:
        return None
    return Norm([attention.q_norm, attention.k_norm], [attention.n_heads, attention.n_kv_heads])


def _rotation(rope: Any) -> tuple[mx.array, bool]:
    """Radians a position for each pair of a head's numbers, and whether pairs are neighbours (`traditional`)."""
    if isinstance(rope, nn.RoPE):
        exponents = mx.arange(0, rope.dims, 2, dtype=mx.float32) / rope.dims
        return rope.scale * mx.power(rope.base, -exponents), bool(rope.traditional)
    if type(rope).__name__ == "Llama3RoPE":
        return 1.0 / rope._freqs, bool(rope.traditional)
    raise Unread("this architecture has another rotary embedding")


def _outputs(layer: Any) -> int:
    return int((layer.linear if "lora_a" in layer else layer).weight.shape[0])
