"""The policy: one model object that samples, trains, and is its own reference."""

from __future__ import annotations

from contextlib import AbstractContextManager

import mlx.core as mx
import mlx.nn as nn

from grpo.model.adapters import Adapters
from grpo.model.logprobs import chunked_logprobs, entropies, scaled, split_head, token_logprobs


class Policy:
    """A model with its adapters, and the logprobs it gives to completions."""

    def __init__(self, model: nn.Module, adapters: Adapters, temperature: float) -> None:
        self.model = model
        self.adapters = adapters
        self.temperature = temperature
        self.split = split_head(model)

    def use(self, state: str) -> AbstractContextManager[None]:
        """Be another state of the adapter (`"reference"`: the base model) inside a `with` block."""
        return self.adapters.use(state)

    @property
    def dtype(self) -> mx.Dtype:
        """What the model computes in: the dtype of its norms, which are never quantised."""
        norms = (m["weight"].dtype for path, m in self.model.named_modules() if "norm" in path and "weight" in m)
        return next(norms, mx.float32)

    def logprobs(
        self, tokens: mx.array, prompt_lengths: mx.array, completion_ids: mx.array, entropy_gradient: bool = False
    ) -> tuple[mx.array, mx.array]:
        """Logprobs and entropies of completions, teacher-forced, at the sampling temperature.

        tokens `[B, L]` prompt and completion, padded on the right (a causal model does not see what comes later,
        so no mask is needed); prompt_lengths `[B]`; completion_ids `[B, T]`. Returns two fp32 `[B, T]` arrays;
        what they hold on padding is finite and means nothing. Entropies carry a gradient if `entropy_gradient`.
        """
        length = completion_ids.shape[1]
        last = tokens.shape[1] - 1
        # The hidden state that predicts completion token t is the one of the token before it.
        positions = mx.minimum(prompt_lengths[:, None] - 1 + mx.arange(length)[None], last - 1)
        if self.split is None:
            logits = mx.take_along_axis(self.model(tokens[:, :-1]), positions[..., None], axis=1)
            logits = scaled(logits, self.temperature)
            entropy = entropies(logits)
            return token_logprobs(logits, completion_ids), entropy if entropy_gradient else mx.stop_gradient(entropy)
        body, head = self.split
        hidden = mx.take_along_axis(body(tokens[:, :-1]), positions[..., None], axis=1)
        return chunked_logprobs(hidden, completion_ids, head, self.temperature, entropy_gradient)
