"""The section `rollout`: how completions are sampled, and how many."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from grpo.config.section import MANY, NonNegative, Positive, Section, Tokens


def _word(given: Any) -> Any:
    """A text for a boolean: YAML reads `off` and `on` as false and true, and Python would accept true as 1."""
    return {False: "off", True: "true (on)"}[given] if isinstance(given, bool) else given


Speculate = Annotated[Literal["auto", "off", 1, 3, 7], BeforeValidator(_word)]


class RolloutConfig(Section):
    prompts_per_step: Positive = 8
    """Number of prompts per step."""
    num_generations: Annotated[int, Field(ge=2, le=MANY)] = 8
    """Number of completions per prompt: the group that shares a baseline."""
    max_completion_length: Tokens = 256
    """Maximum completion length in tokens, the stop token included. A completion that reaches it is truncated, usually
    before its answer. If most completions are truncated, the first step reports it (`alarms.truncated`). The default is
    TRL's; a model that thinks needs thousands."""
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Sampling temperature. Logprobs are computed at the same temperature."""
    top_k: NonNegative = 0
    """Sample only from this many most likely tokens. 0: from all tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample only from the most likely tokens that together reach this probability (arXiv 1904.09751)."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Sample only from tokens that are at least this fraction as likely as the most likely token (arXiv 2407.01082)."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Divide the logits of tokens that are already in the prompt or the completion by this number (arXiv 1909.05858).
    1: off."""
    min_completion_length: Annotated[int, Field(ge=0, le=10 * MANY)] = 0
    """Minimum completion length in tokens. Before it, no stop token can be sampled."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion. They stay in the completion's tokens and are cut from its text."""
    stop_token_ids: tuple[NonNegative, ...] = ()
    """Ids of tokens that end a completion, in addition to the tokenizer's own stop tokens."""
    max_repeats: NonNegative = 0
    """End a completion that repeats its last token, or its last n-gram of up to 16 tokens, this many times in a row. 0:
    never."""
    max_concurrency: Positive = 64
    """Slots of the generator: the maximum number of rows that decode simultaneously. grpo uses fewer slots if memory is
    short."""
    kv_bits: Literal[4, 8] | None = None
    """Quantize the KV cache to this many bits per number while completions are sampled. Default: the cache has the
    model's dtype. A 16-bit cache shrinks to 0.53 (8 bits) or 0.28 (4 bits) of its size. Completions then differ
    slightly from the policy's own, so that `loss.importance_sampling_correction` has to weight their tokens.
    Evaluations sample in the same way; `grpo generate` keeps the model's dtype."""
    speculate: Speculate = "auto"
    """Speculative decoding: how many tokens a decoding step guesses for each row (drafts). The model reads the drafts
    after the row's last token and keeps those that it would have drawn itself: the same tokens in fewer steps. Drafts
    come from earlier completions of the same prompt, from its group and from the prompt itself. `auto`: the number that
    is fastest in measurements, or no drafts if drafts do not help. `off`: no drafts. Evaluations and `grpo generate` do
    the same."""
    dynamic_sampling: NonNegative = 0
    """How many times to sample new prompts to replace groups whose rewards are all equal, until the step is full (DAPO,
    arXiv 2503.14476). 0: never."""
    reuse: Annotated[int, Field(ge=0, le=1000)] = 0
    """Replace groups whose rewards are all equal with earlier groups whose rewards differ, from up to this many steps
    ago. 0: never. A step replays each group at most once. It first takes the groups that were replayed least, and among
    these the newest. The ratios of an older group are relative to the policy that sampled it. With `dynamic_sampling`,
    new prompts come first, and older groups fill what is still missing."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> RolloutConfig:
        if self.min_completion_length >= self.max_completion_length:
            raise ValueError("rollout.min_completion_length must be below max_completion_length")
        if self.max_repeats == 1:
            raise ValueError("rollout.max_repeats: 1 would end every completion at its first token")
        if "" in self.stop:
            raise ValueError("rollout.stop: an empty string would end every completion at its first token")
        return self
