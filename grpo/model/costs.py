"""Lower bounds for a model's bytes and operations. `outline.costs_of_config` reads a model's sizes.

A measured time is compared with these bounds (the roofline of Williams, Waterman and Patterson, 2009): every weight is
read once per pass, every product's multiplications and additions are done once, and data that could stay on the chip
(activations, scores, logits) moves no bytes. Norms, rotations and sampling count as no operations. Attention counts as
full in every layer: a model with sliding windows or recurrent states needs less.
"""

from __future__ import annotations

from dataclasses import dataclass

MOMENT_BYTES = 2 * 4
"""Bytes of AdamW's two moments per trained parameter, in float32. `optim.moments: int8` needs a quarter, which the
bounds ignore: on a CPU, packing takes longer than the saved bytes would."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Floating-point operations (a multiply-add counts as two), and bytes moved between memory and chip."""

    flops: float
    bytes: float

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Demand:
        return Demand(self.flops * times, self.bytes * times)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time on a machine with these rates. Operations and transfers overlap, so the slower one counts."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix that tokens are multiplied with, or one matrix per expert, where each token uses `used` experts.

    `nbytes` counts all experts, and the scales and offsets of a quantized matrix.
    """

    inputs: int
    outputs: int
    nbytes: int
    trains: bool = False
    experts: int = 1
    used: int = 1

    @property
    def flops(self) -> int:
        """Operations per token in the forward pass."""
        return 2 * self.used * self.inputs * self.outputs

    def read(self, tokens: int) -> float:
        """Bytes read for this many tokens. Only experts that some token uses are read; all are equally likely."""
        missed = (1 - self.used / self.experts) ** tokens
        return self.nbytes * (1 - missed)


@dataclass(frozen=True, slots=True)
class Costs:
    """A model's sizes, and lower bounds for its passes. Lengths and contexts are in tokens.

    `products` are the matrices of the blocks, the adapter's included; `head` projects to the vocabulary (a tied head
    uses the embedding's matrix); `other_bytes` are norms and biases. `itemsize` is the bytes of an activation, key or
    value.
    """

    parameters: int
    trained: int
    weight_bytes: int
    products: tuple[Product, ...]
    head: Product
    other_bytes: int
    depth: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.depth * self.kv_heads * self.head_dim * self.itemsize

    def decode(self, rows: int, context: int, shared: int = 0, groups: int = 1) -> Demand:
        """One decoding step of `rows` rows. Each row attends to `context` tokens, the current one included.

        The first `shared` tokens of the context are stored, and read, once per group of rows; there are `groups`.
        """
        flops = rows * (self._token_flops + self.head.flops) + self._attention_flops * rows * context
        cached = groups * shared + rows * (context - shared)
        read = self._read(rows) + self.head.read(rows)
        return Demand(flops, read + self.kv_bytes_per_token * cached)

    def prefill(self, prompts: int, length: int) -> Demand:
        """Prefill of `prompts` prompts: the blocks alone, because only keys and values are needed."""
        tokens, pairs = prompts * length, prompts * _triangle(length)
        flops = tokens * self._token_flops + self._attention_flops * pairs
        return Demand(flops, self._read(tokens) + self.kv_bytes_per_token * tokens)

    def forward(self, prompts: int, prompt_length: int, completions: int, length: int) -> Demand:
        """A forward pass over each prompt once and its `completions`: the blocks alone, without stored activations.

        A completion's last token predicts nothing, but counts, because the trainer computes it too.
        """
        tokens, pairs = _shared(prompts, prompt_length, completions, length)
        return Demand(tokens * self._token_flops + self._attention_flops * pairs, self._read(tokens))

    def logprobs(self, prompts: int, prompt_length: int, completions: int, length: int) -> Demand:
        """`forward`, plus the head on the tokens of completions."""
        predicted = prompts * completions * length
        head = Demand(predicted * self.head.flops, self.head.read(predicted))
        return self.forward(prompts, prompt_length, completions, length) + head

    def update(self, prompts: int, prompt_length: int, completions: int, length: int) -> Demand:
        """Forward pass, backward pass and AdamW over each prompt once and its `completions`.

        The backward pass of a product is as much work as its forward pass, and twice as much where its matrix trains;
        attention's is twice its forward pass. Both passes read the weights; the inputs of blocks are stored in
        between; the gradient, the parameter and its moments are written and read for each trained parameter. Nothing is
        recomputed: gradient checkpointing adds one `forward`.
        """
        predicted = prompts * completions * length
        tokens, pairs = _shared(prompts, prompt_length, completions, length)
        flops = tokens * sum(map(_both_ways, self.products)) + predicted * _both_ways(self.head)
        kept = self.depth * tokens * self.hidden * self.itemsize
        optimizer = self.trained * 2 * (2 * self.itemsize + MOMENT_BYTES)
        read = self._read(tokens) + self.head.read(predicted)
        return Demand(flops + 3 * self._attention_flops * pairs, 2 * read + 2 * kept + optimizer)

    @property
    def _token_flops(self) -> int:
        return sum(product.flops for product in self.products)

    @property
    def _attention_flops(self) -> int:
        """Operations per pair of tokens in all layers: one score, and one weighted value."""
        return 4 * self.depth * self.heads * self.head_dim

    def _read(self, tokens: int) -> float:
        return self.other_bytes + sum(product.read(tokens) for product in self.products)


def _both_ways(product: Product) -> int:
    return product.flops * (3 if product.trains else 2)


def _shared(prompts: int, prompt_length: int, completions: int, length: int) -> tuple[int, int]:
    """Number of tokens, and of (query, visible key) pairs, where completions continue from one pass per prompt."""
    rows = prompts * completions
    pairs = prompts * _triangle(prompt_length) + rows * (length * prompt_length + _triangle(length))
    return prompts * prompt_length + rows * length, pairs


def _triangle(length: int) -> int:
    """Number of (query, visible key) pairs in a causal sequence of this length."""
    return length * (length + 1) // 2
