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
    """Data type of the weights. `auto`: float32 on a CPU, the stored type on a GPU. The score itself is computed in
    float32."""
    quantize: Quantize | None = None
    """Quantize the weights when they are loaded, as `model.quantize` does. Default: the weights stay as stored."""
    max_length: Tokens | None = None
    """Maximum number of tokens of a conversation, chat template included. A longer conversation is not truncated: it
    gets no score, which counts as a failure. Default: the number of positions that the model has."""
    batch_tokens: Tokens = 4096
    """Tokens in one batch, padding included. A longer conversation goes through the model alone."""
    sigmoid: bool = False
    """Turn the score into a probability, 1 / (1 + exp(-score)). Scores far from 0 then differ little."""

    def model(self, name: str) -> ModelConfig:
        """The section `model` of a recipe for the reward model `name`."""
        return ModelConfig(name=name, revision=self.revision, dtype=self.dtype, quantize=self.quantize)


def reward_model_of(kwargs: Mapping[str, Any]) -> RewardModelConfig:
    """A reward model's settings. Raises ValueError for an unknown setting, and for an invalid value."""
    return settings_of(RewardModelConfig, kwargs, "A reward model")
