"""The `kwargs` of a reward `use: model:NAME`: how a reward model is loaded, and how it reads completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo.config.kwargs import settings_of
from grpo.config.model import Dtype, ModelConfig, Quantize
from grpo.config.section import Section, Tokens


class RewardModelConfig(Section):
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    dtype: Dtype = "auto"
    """Of the weights. `auto`: float32 on a CPU, as stored on a GPU. The score itself is computed in float32."""
    quantize: Quantize | None = None
    """Quantise the weights when they are loaded, as `model.quantize` does. Default: they stay as stored."""
    max_length: Tokens | None = None
    """Most tokens of a templated conversation. A longer one is not cut: it gets no score, which counts as a failure.
    Default: as many as the model has positions."""
    batch_tokens: Tokens = 4096
    """Tokens that go through the model at once, padding included; a longer conversation goes alone."""
    sigmoid: bool = False
    """Make the score a probability, 1 / (1 + exp(-score)): scores far from 0 then differ by little."""

    def model(self, name: str) -> ModelConfig:
        """The model of this name, as a recipe's section would have it."""
        return ModelConfig(name=name, revision=self.revision, dtype=self.dtype, quantize=self.quantize)


def reward_model_of(kwargs: Mapping[str, Any]) -> RewardModelConfig:
    """A reward model's settings. Raises ValueError for an unknown one, and for a value of another type."""
    return settings_of(RewardModelConfig, kwargs, "A reward model")
