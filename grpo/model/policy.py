"""The policy: one model object that samples, trains, and is its own reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.blame import cause
from grpo.backend.device import on_gpu
from grpo.errors import UserError
from grpo.model.adapters import Adapters
from grpo.model.attending import InTiles, Untiled
from grpo.model.attention import most_pairs
from grpo.model.checkpointing import PLAIN, CheckpointOf, always, checkpointed_layers
from grpo.model.fsdp import Spread
from grpo.model.head import Body, Head, Unsplit, split_head
from grpo.model.lines import Lines, Unpacked, at_rows, check_lines, line_hidden
from grpo.model.logprobs import (
    LOGITS,
    Beside,
    chunk_tokens,
    chunked_logprobs,
    scaled,
    token_logprobs,
    with_entropies,
)
from grpo.model.offloading import Vault, keeping_in
from grpo.model.promptcaches import Kind
from grpo.model.quantized import dtype_of
from grpo.model.rowwise import RowWise
from grpo.model.shards import Shards
from grpo.model.sharing import Unshared, hidden_at, shared_hidden, shared_layers, whole_sequences

KEEPS = "attention keeps its scores for the backward pass, which takes memory proportional to the square of the length"

ALL_TOKENS = "the backward pass computes a checkpointed layer's MLP for all tokens together, which takes more memory"


class Policy:
    """A model with its adapters, and the logprobs that it assigns to completions.

    `slow` lists the reasons, if any, why training takes a slower path with this model. Some settings change memory and
    speed, but no results: `share_prompts`; `gradient_checkpointing` (all layers, none, or a number of layers, from the
    first); a `vault`, which stores the inputs of checkpointed layers until the backward pass; and `logits`, the largest
    number of logits in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Adapters,
        temperature: float,
        share_prompts: bool = True,
        gradient_checkpointing: bool | int = False,
        vault: Vault | None = None,
    ) -> None:
        """Raises UserError for a model that cannot be called without a cache, as training calls it."""
        self.model = model
        self.adapters = adapters
        self.temperature = temperature
        self.gradient_checkpointing = gradient_checkpointing
        self.vault, self.logits = vault, LOGITS[on_gpu()]
        self.spread: Spread | None = None
        self._checkpoint_of: CheckpointOf = PLAIN
        self.slow: list[str] = []
        self.split: tuple[Body, Head] | None = None
        try:
            self.split = split_head(model)
        except Unsplit as reason:
            self.slow.append(f"logprobs go through full logits, because the head cannot be split off: {reason}")
            _check_called(model)
        self._in_tiles: InTiles | None = InTiles(model)
        try:
            self._fault = self._in_tiles.fault(model if self.split is None else self.split[0])
        except Untiled as reason:
            self._in_tiles, self._fault = None, str(reason)
        if self._fault:
            self.slow.append(f"{KEEPS}: {self._fault}")
        self._row_wise = RowWise(model)
        if self._row_wise.fault:
            self.slow.append(f"{ALL_TOKENS}: {self._row_wise.fault}")
        self._layers: list[Kind] = []
        self._lines: bool | None = None
        self.share_prompts = share_prompts and self._can_share()

    def _can_share(self) -> bool:
        if self.split is None:
            return False
        try:
            self._layers = self._shared_layers(self.split[0])
        except Unshared as reason:
            self.slow.append(f"the prompt is computed again for each completion, not once per group: {reason}")
        return bool(self._layers)

    def _shared_layers(self, body: Body) -> list[Kind]:
        try:
            with self._attention():
                return shared_layers(self.model, body)
        except Unshared as reason:
            in_tiles, self._in_tiles = self._in_tiles, None
            try:
                layers = shared_layers(self.model, body)
            except Unshared:
                self._in_tiles = in_tiles  # tiles are not the cause
                raise
            self.slow.append(f"{KEEPS}: {reason}")
            return layers

    @property
    def notes(self) -> list[str]:
        """Notes for the user about the paths that training takes."""
        return self.slow if self.vault is None else [*self.slow, self.vault.note()]

    @property
    def most_pairs(self) -> int | None:
        """Most (query, key) pairs whose scores a pass stores for the backward pass; None if all scores are stored."""
        if self._in_tiles is None or self._fault:
            return None
        return most_pairs(int(getattr(self.model.args, "num_attention_heads", 1)))

    @property
    def packs(self) -> bool:
        """Whether completions may be packed (`line_logprobs`). The first call runs a trial."""
        if self._lines is None:
            self._lines = self.share_prompts and self._can_pack()
        return self._lines

    def _can_pack(self) -> bool:
        assert self.split is not None, "shared prompts need a split model"
        try:
            with self._attention():
                check_lines(self.model, self.split[0], self._layers, self.dtype)
        except Unpacked as reason:
            self.slow.append(f"completions are not packed; each trains in its own row: {reason}")
            return False
        return True

    @property
    def shards(self) -> Shards:
        """Which arrays of gradients and of the optimizer's state are parts of larger arrays."""
        return self.adapters.shards if self.spread is None else self.spread.shards

    @property
    def is_spread(self) -> bool:
        """Whether this process now holds only parts of the weights (`model.shard: fsdp`)."""
        return self.spread is not None and self.spread.is_on

    def spreading(self) -> AbstractContextManager[None]:
        """A block in which processes that spread the weights hold only their parts."""
        return nullcontext() if self.spread is None else self.spread.begun()

    @property
    def _spread(self) -> Spread:
        assert self.spread is not None
        return self.spread

    def _gathering(self) -> AbstractContextManager[None]:
        return nullcontext() if self.spread is None else self.spread.through()

    def use(self, state: str) -> AbstractContextManager[None]:
        """A `with` block in which another state of the adapter is active (`"reference"`: the base model)."""
        return self.adapters.use(state)

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Compute attention in tiles inside the block, except on a GPU without a gradient, where MLX's fused forward
        pass is used."""
        if self._in_tiles is None or (on_gpu() and not self.model.training):
            yield
            return
        with self._in_tiles.begun():
            yield

    @contextmanager
    def _through_layers(self) -> Iterator[None]:
        """The block in which hidden states are computed."""
        on, checkpoint_of = self.gradient_checkpointing, self._checkpoint_of
        if self.is_spread:
            on, checkpoint_of = True, self._spread.checkpoint
        with (
            self._attention(),
            self._gathering(),
            checkpointed_layers(self.model.layers, on, self._row_wise, checkpoint_of),
        ):
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """The block in which gradients are taken. Outside it, some (recurrent) models use kernels without a gradient.

        With a vault, a gradient must be evaluated before the next block begins.
        """
        former = self.model.training
        self.model.train()
        if self.spread is not None:
            self.spread.begin()
        if self.vault is not None:
            self.vault.begin()
            # Only here: without a backward pass, nothing would take the inputs out of the vault again.
            self._checkpoint_of = always(keeping_in(self.vault))
        try:
            yield
        finally:
            self.model.train(former)
            if self.spread is not None:
                self.spread.begin()
            self._checkpoint_of = PLAIN

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        with self._gathering():
            size: int = self.model(mx.array([[0]])).shape[-1]  # only the shape: nothing is evaluated
        return size

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype that the model computes in."""
        return dtype_of(self.model)

    def logprobs(
        self,
        tokens: mx.array,
        prompt_lengths: mx.array,
        completion_ids: mx.array,
        entropy_gradient: bool = False,
        entropies: bool = True,
    ) -> tuple[mx.array, ...]:
        """Logprobs and entropies of completions, teacher-forced, at the sampling temperature.

        tokens `[B, L]` prompt and completion, padded on the right (a causal model does not see later tokens, so no mask
        is needed); prompt_lengths `[B]`; completion_ids `[B, T]`. Returns two fp32 `[B, T]` arrays, whose values on
        padding are finite but meaningless. Entropies carry a gradient if `entropy_gradient` is set. Without `entropies`
        they are not computed, and only logprobs are returned.
        """
        hidden = self._hidden(tokens, prompt_lengths, completion_ids)
        if self.split is not None:
            return self._projected(hidden, completion_ids, entropy_gradient, entropies)
        logits = scaled(hidden, self.temperature)
        if not entropies:
            return (token_logprobs(logits, completion_ids),)
        return with_entropies(logits, completion_ids, entropy_gradient)

    def group_logprobs(
        self,
        prompt_ids: mx.array,
        prompt_lengths: mx.array,
        prompt_index: mx.array,
        completion_ids: mx.array,
        entropy_gradient: bool = False,
        entropies: bool = True,
    ) -> tuple[mx.array, ...]:
        """`logprobs` for completions `[B, T]` of prompts `[P, L]`, where row b has the prompt `prompt_index[b]`.

        With `share_prompts`, each prompt goes through the model once; otherwise once per completion.
        """
        if self.split is None:
            tokens, lengths = whole_sequences(prompt_ids, prompt_lengths, prompt_index, completion_ids)
            return self.logprobs(tokens, lengths, completion_ids, entropy_gradient, entropies)
        hidden = self.group_hidden(prompt_ids, prompt_lengths, prompt_index, completion_ids)
        return self._projected(hidden, completion_ids, entropy_gradient, entropies)

    def line_logprobs(
        self, lines: mx.array, starts: mx.array, length: int, entropy_gradient: bool = False, entropies: bool = True
    ) -> tuple[mx.array, ...]:
        """`logprobs` for packed completions: `lines` `[5 or 3, R, W]` as laid out by `grpo.model.lines`, and `starts`
        `[B]`, the place of each row's first token. Returns `[B, length]` arrays."""
        laid = Lines(*lines)
        found = self._projected(self.line_hidden(laid), laid.targets, entropy_gradient, entropies)
        return tuple(at_rows(values, starts, length, laid.rows) for values in found)

    def hidden_logprobs(
        self, hidden: mx.array, tokens: mx.array, entropy_gradient: bool, beside: Beside
    ) -> tuple[mx.array, ...]:
        """Logprobs and entropies from hidden states `[B, T, D]` that predict tokens `[B, T]`, and the values that
        `beside` computes from the same logits."""
        return self._projected(hidden, tokens, entropy_gradient, True, beside)

    def line_hidden(self, lines: Lines) -> mx.array:
        """The hidden states of all places of the lines, `[R, W, D]`."""
        assert self.packs
        assert self.split is not None
        with self._through_layers():
            return line_hidden(self.model, self.split[0], len(self._layers), lines, self.dtype)

    def group_hidden(
        self, prompt_ids: mx.array, prompt_lengths: mx.array, prompt_index: mx.array, completion_ids: mx.array
    ) -> mx.array:
        """The hidden states that predict the completions' tokens; if the head cannot be split off, the logits."""
        if not self.share_prompts:
            tokens, lengths = whole_sequences(prompt_ids, prompt_lengths, prompt_index, completion_ids)
            return self._hidden(tokens, lengths, completion_ids)
        assert self.split is not None
        with self._through_layers():
            return shared_hidden(self.split[0], self._layers, prompt_ids, prompt_lengths, prompt_index, completion_ids)

    def next_logits(self, tokens: mx.array, last: mx.array) -> mx.array:
        """The logits of the token after place `last` `[B]` of each row of tokens `[B, L]`: `[B, V]`, float32, at
        temperature 1. Rows are padded on the right."""
        body, head = (self.model, None) if self.split is None else self.split
        with self._attention():
            states = body(tokens, cache=None)
        states = mx.take_along_axis(states, last[:, None, None], axis=1)
        return scaled(states if head is None else head(states), 1.0)[:, 0]

    def _hidden(self, tokens: mx.array, prompt_lengths: mx.array, completion_ids: mx.array) -> mx.array:
        body = self.model if self.split is None else self.split[0]
        with self._through_layers():
            return hidden_at(body(tokens, cache=None), prompt_lengths, completion_ids.shape[1])

    def _projected(
        self,
        hidden: mx.array,
        tokens: mx.array,
        entropy_gradient: bool,
        entropies: bool,
        beside: Beside | None = None,
    ) -> tuple[mx.array, ...]:
        assert self.split is not None
        head = self.split[1]

        def project(hidden: mx.array) -> tuple[mx.array, ...]:
            chunk = chunk_tokens(head(hidden[:1, :1]).shape[-1], self.logits)  # only the shape: nothing is evaluated
            return chunked_logprobs(
                hidden, tokens, head, self.temperature, chunk, entropy_gradient, self.model, entropies, beside
            )

        if not self.is_spread:
            return project(hidden)
        found: tuple[mx.array, ...] = self._spread.through_head(project, hidden)
        return found


def _check_called(model: nn.Module) -> None:
    """Raise UserError for a model that cannot be called as training calls it. Nothing is evaluated."""
    try:
        model(mx.array([[1, 2, 3]]), cache=None)
    except Exception as error:  # the model's code may raise anything
        raise UserError(
            "this model cannot be trained: training calls it on whole sequences without a cache, as model(tokens, "
            f"cache=None), and this raises {cause(error)}. Make the model's __call__ accept cache=None"
        ) from error
