"""The section `rollout`: how many completions are sampled, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from grpo.config.section import MANY, NonNegative, Positive, Section, Tokens


def _word(given: Any) -> Any:
    """YAML reads the words `off` and `on` as false and true, and Python takes true for 1."""
    return {False: "off", True: "true (on)"}[given] if isinstance(given, bool) else given


Speculate = Annotated[Literal["auto", "off", 1, 3, 7], BeforeValidator(_word)]


class RolloutConfig(Section):
    prompts_per_step: Positive = 8
    """Prompts in a step."""
    num_generations: Annotated[int, Field(ge=2, le=MANY)] = 8
    """Completions of each prompt: the group that shares a baseline."""
    max_completion_length: Tokens = 256
    """In tokens, the stop token included. A completion that reaches it is cut off, mostly before its answer: where most
    are, the first step says so (`alarms.truncated`). The default is TRL's; a model that thinks needs thousands."""
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Of sampling; logprobs are taken at the same temperature."""
    top_k: NonNegative = 0
    """Sample from this many most likely tokens. 0: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens that together reach this probability (arXiv 1904.09751)."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Sample from tokens at least this fraction as likely as the likeliest (arXiv 2407.01082)."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Divides the logits of tokens that stand in prompt or completion already (arXiv 1909.05858). 1: off."""
    min_completion_length: Annotated[int, Field(ge=0, le=10 * MANY)] = 0
    """In tokens: before that none of the stop tokens can be sampled."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion. They stay in its tokens and are cut from its text."""
    stop_token_ids: tuple[NonNegative, ...] = ()
    """Tokens that end a completion, besides the tokenizer's own."""
    max_repeats: NonNegative = 0
    """End a completion that repeats its last token, or n-gram of up to 16, so many times in a row. 0: never."""
    max_concurrency: Positive = 64
    """Slots of the generator: rows decoded at once. Fewer are used where memory wants it."""
    kv_bits: Literal[4, 8] | None = None
    """Keep keys and values in so many bits a number while completions are sampled. Default: in the model's dtype. Of 16
    bits that leaves 0.53 (8) or 0.28 (4). Completions are then not quite the policy's own, so that
    `loss.importance_sampling_correction` has to weigh their tokens. Evaluations sample in the same way; `grpo generate`
    keeps the model's dtype."""
    speculate: Speculate = "auto"
    """How many tokens a step guesses for each row (drafts). The model gets them behind the row's last token, and those
    that it would have drawn stay: the same tokens in fewer steps. Drafts come from earlier completions of this prompt,
    from its group and from the prompt itself. `auto`: as many as pay, by measurement, and none where none do; `off`:
    none. Evaluations and `grpo generate` do the same."""
    dynamic_sampling: NonNegative = 0
    """How often to sample fresh prompts in the place of groups without variance, until the step is full (DAPO, arXiv
    2503.14476)."""
    reuse: Annotated[int, Field(ge=0, le=1000)] = 0
    """Replay groups with variance, from up to so many steps ago, in the place of groups without variance (0: never). A
    step replays each group at most once. It takes the groups that were replayed least, and of these the newest. The
    ratios of an older group are to the policy that sampled it. With `dynamic_sampling` fresh prompts come first, and
    older groups fill what is still missing."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> RolloutConfig:
        if self.min_completion_length >= self.max_completion_length:
            raise ValueError("rollout.min_completion_length is not below max_completion_length")
        if self.max_repeats == 1:
            raise ValueError("rollout.max_repeats: 1 would end every completion at its first token")
        if "" in self.stop:
            raise ValueError("rollout.stop: an empty string would end every completion at its first token")
        return self
