"""What a model's work must cost at least, in bytes and operations. `outline.costs_of_config` reads a model's sizes.

A bound from below, to hold a measured time against (the roofline of Williams, Waterman and Patterson, 2009): every
weight is read once a pass, every product's multiplications and additions are made once, and what could stay on the chip
(activations, scores, logits) moves no bytes. Norms, rotations and sampling count no operations. Attention counts as
full in every layer: a model with windows or states needs less.
"""

from __future__ import annotations

from dataclasses import dataclass

MOMENT_BYTES = 2 * 4
"""AdamW's two moments of a trained number in float32. With `optim.moments: int8` they are a quarter of that, which no
step is credited with: on a CPU packing takes longer than the bytes save."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Operations, a multiplication and an addition being two, and bytes between memory and chip."""

    flops: float
    bytes: float

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Demand:
        return Demand(self.flops * times, self.bytes * times)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time on a machine of these rates: operations and bytes at once, so the slower of both."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix that tokens are multiplied with, or a matrix of each expert, of which a token meets `used`.

    `nbytes` are those of all experts, a quantised matrix's scales and offsets included.
    """

    inputs: int
    outputs: int
    nbytes: int
    trains: bool = False
    experts: int = 1
    used: int = 1

    @property
    def flops(self) -> int:
        """Of one token, forward."""
        return 2 * self.used * self.inputs * self.outputs

    def read(self, tokens: int) -> float:
        """Bytes read for so many tokens: of experts those that are met, if each is as likely as any other."""
        missed = (1 - self.used / self.experts) ** tokens
        return self.nbytes * (1 - missed)


@dataclass(frozen=True, slots=True)
class Costs:
    """A model's sizes, and the least work of what is done with it. Lengths and contexts are in tokens.

    `products` are those of the blocks, an adapter's among them; `head` projects to the vocabulary (tied: with the
    embedding's matrix); `other_bytes` are norms and biases. `itemsize` is that of an activation, a key or a value.
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
        """Keys and values of one token in all layers."""
        return 2 * self.depth * self.kv_heads * self.head_dim * self.itemsize

    def decode(self, rows: int, context: int, shared: int = 0, groups: int = 1) -> Demand:
        """One decoding step of `rows` rows, each attending to `context` tokens, itself included.

        The first `shared` of them are kept, and read, once for each of `groups` groups of rows.
        """
        flops = rows * (self._token_flops + self.head.flops) + self._attention_flops * rows * context
        cached = groups * shared + rows * (context - shared)
        read = self._read(rows) + self.head.read(rows)
        return Demand(flops, read + self.kv_bytes_per_token * cached)

    def prefill(self, prompts: int, length: int) -> Demand:
        """Prompts through the blocks, for their keys and values alone: no head."""
        tokens, pairs = prompts * length, prompts * _triangle(length)
        flops = tokens * self._token_flops + self._attention_flops * pairs
        return Demand(flops, self._read(tokens) + self.kv_bytes_per_token * tokens)

    def forward(self, prompts: int, prompt_length: int, completions: int, length: int) -> Demand:
        """`completions` of each prompt through the blocks, each prompt once: no head, and nothing is kept.

        A completion's last token, which predicts nothing, goes through as it does in the trainer.
        """
        tokens, pairs = _shared(prompts, prompt_length, completions, length)
        return Demand(tokens * self._token_flops + self._attention_flops * pairs, self._read(tokens))

    def logprobs(self, prompts: int, prompt_length: int, completions: int, length: int) -> Demand:
        """The same with the head, which only the tokens of completions meet."""
        predicted = prompts * completions * length
        head = Demand(predicted * self.head.flops, self.head.read(predicted))
        return self.forward(prompts, prompt_length, completions, length) + head

    def update(self, prompts: int, prompt_length: int, completions: int, length: int) -> Demand:
        """Forward, backward and AdamW over `completions` of each prompt, which itself goes through the blocks once.

        The backward pass of a product is as much work as its forward pass, and as much again where its matrix trains;
        attention's is twice the forward. Weights are read in both, blocks' inputs kept between them, and for each
        trained number the gradient, the number and its moments are written and read. Nothing is computed twice:
        checkpointed layers cost a `forward` more.
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
        """Of one token attending to one, in all layers: a score, and a value's share."""
        return 4 * self.depth * self.heads * self.head_dim

    def _read(self, tokens: int) -> float:
        return self.other_bytes + sum(product.read(tokens) for product in self.products)


def _both_ways(product: Product) -> int:
    return product.flops * (3 if product.trains else 2)


def _shared(prompts: int, prompt_length: int, completions: int, length: int) -> tuple[int, int]:
    """Tokens, and pairs of one and one that it may see, where completions go on from a prompt's one pass."""
    rows = prompts * completions
    pairs = prompts * _triangle(prompt_length) + rows * (length * prompt_length + _triangle(length))
    return prompts * prompt_length + rows * length, pairs


def _triangle(length: int) -> int:
    """Pairs of a token and one that it may see."""
    return length * (length + 1) // 2
