"""A reward model: a classifier that scores conversations in the trainer's process, one call per step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from grpo.backend.hub import one_line
from grpo.config import RewardConfig
from grpo.config.rewardmodel import RewardModelConfig, reward_model_of
from grpo.data.rendering import rendered_text
from grpo.errors import UserError
from grpo.model.classifier import Classifier, load_classifier
from grpo.model.mlxlm import TokenizerWrapper
from grpo.plugins import locate_reward
from grpo.scoring.grader import Inline
from grpo.types import Message


class RewardModel:
    """Scores prompts with completions, both as messages, rendered by the model's chat template."""

    def __init__(self, classifier: Classifier, tokenizer: TokenizerWrapper, cfg: RewardModelConfig) -> None:
        self.classifier, self.tokenizer, self.cfg = classifier, tokenizer, cfg
        self.longest = cfg.max_length or classifier.positions or math.inf

    def __call__(
        self, prompts: Sequence[list[Message]], completions: Sequence[list[Message]], **_: Any
    ) -> list[float | Exception]:
        """A score per conversation; an exception if it is too long, or if the chat template raises an error."""
        read = [self._read([*prompt, *said]) for prompt, said in zip(prompts, completions, strict=True)]
        rows = [ids for ids in read if isinstance(ids, list)]
        scores = iter(self.classifier.scores(rows, self.cfg.batch_tokens))
        return [self._given(next(scores)) if isinstance(ids, list) else ids for ids in read]

    def _read(self, messages: list[Message]) -> list[int] | Exception:
        """The token ids of a conversation, or why it cannot be scored."""
        try:
            text = rendered_text(self.tokenizer, messages, (), {}, generation=False)
            ids = list(self.tokenizer.encode(text.encode(errors="replace").decode(), add_special_tokens=False))
        except Exception as error:  # the template is the model's own code
            return ValueError(
                f"the reward model's chat template raised an error on this conversation: {one_line(error)}"
            )
        if len(ids) > self.longest:
            return ValueError(
                f"the conversation has {len(ids):,} tokens, but the reward model reads at most {self.longest:,} "
                "(kwargs.max_length, or the model's number of positions)"
            )
        return ids if ids else ValueError("the reward model's chat template renders this conversation to no tokens")

    def _given(self, score: float) -> float:
        return (1 + math.tanh(score / 2)) / 2 if self.cfg.sigmoid else score


class Modeled(Inline):
    """A reward model as a reward of the recipe."""

    def __init__(self, config: RewardConfig, system: str | None = None, calls: str = "step") -> None:
        """Load the model that the recipe's reward names; `system` is the system message before text prompts.

        `calls` says what one call gets; by default all completions of a step.

        Raises UserError if the model cannot be loaded, or is not a reward model.
        """
        name, cfg = config.name or locate_reward(config.use).name, reward_model_of(config.kwargs)
        try:
            self.model = RewardModel(*load_classifier(cfg.model(config.model)), cfg)
        except UserError as error:
            raise UserError(f"reward {name!r}: {error}") from None
        super().__init__(name, self.model, {}, calls, "messages", system)
