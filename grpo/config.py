"""The recipe's schema: every setting, its meaning, its bounds and its one default.

`grpo.recipe` reads a file into it. Everything is frozen and strict: an unknown key or a value of another type
is an error. The texts under the fields are what people read about them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    name: str
    """A folder, a Hub repository, or `builtin:arithmetic-student`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights. `auto`: float32 on a CPU (where nothing else is fast), as stored on a GPU."""


class AdapterConfig(Section):
    type: Literal["lora"] = "lora"
    """The kind of adapter: LoRA (arXiv 2106.09685)."""
    rank: Positive = 16
    """Rank of each update B A."""
    scale: Annotated[float, Field(gt=0)] = 2.0
    """The update is scale × B A (mlx-lm's convention; PEFT's alpha is scale × rank)."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear` (each linear layer of each block, the head excluded) or names such as `self_attn.q_proj`."""


class DataConfig(Section):
    source: str
    """A .jsonl, .json, .csv or .parquet file, a Hub dataset, or `builtin:arithmetic`."""
    config: str | None = None
    """Configuration of a Hub dataset, such as `main`."""
    split: str = "train"
    """Split to train on. A file is one split, `train`."""
    prompt: str = "prompt"
    """A column of text or of chat messages, or a template over columns: `"{question} Think first."`."""
    system: str | None = None
    """A system message to put before text prompts. Needs the chat template."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Whether text prompts go through the chat template as a user's message. `auto`: if the model has one."""
    chat_template_kwargs: dict[str, Any] = {}
    """Handed to the chat template, such as `enable_thinking: false`."""
    max_prompt_length: Positive = 1024
    """In tokens. Longer prompts are dropped and counted, never cut."""


class RolloutConfig(Section):
    prompts_per_step: Positive = 8
    """Prompts in a step."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions of each prompt: the group that shares a baseline."""
    max_completion_length: Positive = 256
    """In tokens, the stop token included."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of sampling; logprobs are taken at the same temperature."""
    max_concurrency: Positive = 64
    """Slots of the generator: rows decoded at once."""


class RewardConfig(Section):
    use: str
    """A bundled name, `file.py:function`, or `package.module:function`."""
    weight: float = 1.0
    """Weight in the sum of rewards. 0 makes it a metric only."""


class AdvantageConfig(Section):
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What centred rewards are divided by: their deviation in the group, in the batch, or nothing."""


class LossConfig(Section):
    type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    """Which average: over each sequence, then sequences (grpo, arXiv 2402.03300), over the step's tokens
    (dapo, arXiv 2503.14476), over a constant (dr_grpo, arXiv 2503.20783)."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio is clipped below at 1 - epsilon."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """The ratio is clipped above at 1 + epsilon_high. Default: epsilon."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL penalty to the reference. 0: no reference is computed."""


class OptimConfig(Section):
    steps: Positive
    """Training steps: each samples, scores and updates."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: constant, or down to 0 by the last step."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradient is scaled down to this norm."""
    num_iterations: Positive = 1
    """Updates per rollout. Above 1, the ratio is to the logprobs before the first of them."""
    micro_batch_size: Positive = 8
    """Rows that go through the model together in the update. Changes memory and speed, not the gradient."""


class EvalConfig(Section):
    source: str | None = None
    """Where held-out prompts come from. Default: `data.source`."""
    split: str = "test"
    """Split to evaluate on."""
    every: Positive = 25
    """Steps between evaluations. There is one before the first step and one after the last, too."""
    prompts: Positive = 128
    """How many held-out prompts, from the start of the split."""
    samples: Positive = 4
    """Completions of each prompt for avg@k and pass@k, at `rollout.temperature`. Greedy is always measured."""


class CheckpointConfig(Section):
    every: Positive = 25
    """Steps between checkpoints. The last step always has one."""
    keep: Positive = 3
    """How many to keep: the newest."""


class WandbConfig(Section):
    project: str = "grpo"
    """Project to log to."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes the run to its folder, for `wandb sync` later."""


class LogConfig(Section):
    wandb: WandbConfig | None = None
    """Log to Weights & Biases as well."""


class Recipe(Section):
    """A whole run. `data`, `model`, `rewards` and `optim.steps` have no default.

    Files and folders are looked for beside the recipe, then in the working directory.
    """

    seed: NonNegative = 0
    """All randomness comes from it."""
    output_dir: str | None = None
    """The run's folder. Default: `runs/<name of the recipe>`."""
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig
    eval: EvalConfig | None = None
    """Without this section nothing is evaluated."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _some_reward_counts(self) -> Recipe:
        if all(reward.weight == 0 for reward in self.rewards):
            raise ValueError("every reward has weight 0, so nothing would be learnt: give one a weight")
        return self
