"""The recipe's schema: every setting, its meaning, its bounds and its one default.

`grpo.recipe` reads a file into it, and `grpo recipes schema` prints it. Everything is frozen and strict: an unknown key
or a value of another type is an error. The texts under the fields are what people read about them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo.config.objective import AdvantageConfig as AdvantageConfig
from grpo.config.objective import LossConfig as LossConfig
from grpo.config.section import LARGE, MANY, Above0, AtLeast0, Fraction, Name, NonNegative, Positive, Section, Tokens
from grpo.presets import Baseline

FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Endings of data files, and the reader of `datasets` for each."""

DAY = 86_400
"""Seconds."""

Optimizer = Literal["adamw", "adam", "adamax", "sgd", "lion", "adafactor", "muon", "rmsprop", "adagrad", "adadelta"]


class ModelConfig(Section):
    name: Name
    """A folder, a Hub repository, or a built-in task's student, such as `builtin:arithmetic-student`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights. `auto`: float32 on a CPU (where nothing else is fast), as stored on a GPU."""
    quantize: Literal[2, 3, 4, 5, 6, 8] | None = None
    """Quantise the weights to so many bits when they are loaded, in groups of 64. Default: they stay as stored."""
    head_dtype: Literal["auto", "float32", "model"] = "auto"
    """What the head of a 16-bit model computes logits in, for sampling and training alike. In the `model`'s own dtype
    logprobs are up to 0.08 nats off. In `float32` they are exact for the hidden states, which costs passes over a copy
    of the head's matrix, made in pieces of 64 MB (`grpo bench head` measures it); a quantised head costs nothing more.
    `auto`: float32, unless the head cannot be found. A float32 model has nothing to choose."""

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> ModelConfig:
        if self.dtype == "float32" and "head_dtype" in self.changed:
            raise ValueError("model.head_dtype does nothing with model.dtype: float32, whose logits are float32")
        if self.revision is not None and self.name.startswith("builtin:"):
            raise ValueError(f"model.revision does nothing with {self.name}: it is for Hub repositories")
        return self


class AdapterConfig(Section):
    type: Literal["lora", "dora", "full"] = "lora"
    """What trains: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353), or the weights themselves."""
    rank: Positive = 16
    """Rank of each update B A."""
    scale: Above0 = 2.0
    """The update is scale × B A (mlx-lm's convention; PEFT's alpha is scale × rank)."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """`all-linear` (each linear layer of each block, experts included, what routes to them and the head excluded) or
    names such as `self_attn.q_proj`."""
    layers: Literal["all"] | tuple[NonNegative, Positive] = "all"
    """Blocks that train: `[14, 28]` is from block 14 up to, not including, block 28."""
    path: Name | None = None
    """A saved adapter's folder to go on from; a frozen copy of it is the reference then. Default: a fresh one."""
    sync_reference_every: Positive | None = None
    """Steps after which the reference moves to the policy. Default: it stays what it was at the start."""
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """How far it moves then: alpha × policy + (1 - alpha) × reference, array by array (arXiv 2404.09656)."""

    @property
    def has_reference(self) -> bool:
        """Whether the reference is a state of the adapter, and not the model as it is loaded."""
        return self.path is not None or self.sync_reference_every is not None

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> AdapterConfig:
        if self.type == "full" and (unread := self.changed & {"rank", "scale", "targets"}):
            raise ValueError(f"adapter.{min(unread)} does nothing with adapter.type: full")
        if self.layers != "all" and self.layers[0] >= self.layers[1]:
            raise ValueError("adapter.layers: the first block is not before the last")
        if "ref_model_mixup_alpha" in self.changed and self.sync_reference_every is None:
            raise ValueError("adapter.ref_model_mixup_alpha does nothing without adapter.sync_reference_every")
        return self


class DataConfig(Section):
    source: Name
    """A .jsonl, .json, .csv or .parquet file, a Hub dataset, or a built-in task: `builtin:arithmetic`,
    `builtin:countdown`, `builtin:sorting` or `builtin:format`."""
    config: str | None = None
    """Configuration of a Hub dataset, such as `main`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    split: str = "train"
    """Split to train on. A file is one split, `train`."""
    columns: dict[str, str] = {}
    """Names for columns that prompt and rewards want under another: `{answer: solution}` reads `solution` as `answer`,
    `{answer: reward_model.ground_truth}` a field inside one, `{example: tests.0}` the first item of a list."""
    prompt: str = "prompt"
    """A column of text or of chat messages, or a template over columns of text and numbers: `"{question} Think
    first."`."""
    system: str | None = None
    """A system message to put before text prompts. Needs the chat template."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Whether text prompts go through the chat template as a user's message. `auto`: if the model has one."""
    chat_template_kwargs: dict[str, Any] = {}
    """Handed to the chat template, such as `enable_thinking: false`."""
    max_prompt_length: Tokens = 1024
    """In tokens. Longer prompts are dropped and counted, never cut."""

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> DataConfig:
        if self.system is not None and self.chat_template == "never":
            raise ValueError("data.system needs the chat template, and data.chat_template is never")
        if self.chat_template_kwargs and self.chat_template == "never":
            raise ValueError("data.chat_template_kwargs does nothing with data.chat_template: never")
        if _is_local(self.source) and (unread := self.changed & {"config", "revision"}):
            raise ValueError(f"data.{min(unread)} is for Hub datasets; this source has none")
        if ours := {"tokenize", "add_generation_prompt", "return_dict"} & set(self.chat_template_kwargs):
            raise ValueError(f"data.chat_template_kwargs: {', '.join(sorted(ours))} is not yours to set")
        return self


def _is_local(source: str) -> bool:
    """Whether a source is no dataset of the Hub."""
    return source.startswith("builtin:") or Path(source).suffix in FILE_TYPES


class RolloutConfig(Section):
    prompts_per_step: Positive = 8
    """Prompts in a step."""
    num_generations: Annotated[int, Field(ge=2, le=MANY)] = 8
    """Completions of each prompt: the group that shares a baseline."""
    max_completion_length: Tokens = 256
    """In tokens, the stop token included."""
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
    dynamic_sampling: NonNegative = 0
    """How often to sample fresh prompts in the place of groups without variance, until the step is full (DAPO, arXiv
    2503.14476)."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> RolloutConfig:
        if self.min_completion_length >= self.max_completion_length:
            raise ValueError("rollout.min_completion_length is not below max_completion_length")
        if self.max_repeats == 1:
            raise ValueError("rollout.max_repeats: 1 would end every completion at its first token")
        if "" in self.stop:
            raise ValueError("rollout.stop: an empty string would end every completion at its first token")
        return self


class RewardConfig(Section):
    use: Name
    """A bundled name, that of an installed package's entry point (group `grpo.rewards`), `file.py:function`, or
    `package.module:function`."""
    weight: Annotated[float, Field(ge=-LARGE, le=LARGE)] = 1.0
    """Weight in the sum of rewards. 0 makes it a metric only."""
    name: str | None = None
    """What its metrics go by. Default: the function's name, or its file's if that is `reward`."""
    kwargs: dict[str, Any] = {}
    """Arguments for the function, or for what makes it: a class, or a function that takes no completions."""
    completions: Literal["text", "messages"] | None = None
    """The form of completions and prompts that the function reads: texts, or lists of chat messages. Default: what its
    annotations say (`list[str]`, `list[list[dict]]`), or else what the dataset has; a function that then fails at
    `completion[0]["content"]` gets messages."""
    isolation: Literal["process", "inline"] = "process"
    """`process`: a worker process of its own. `inline`: in the trainer's, for cheap ones that you trust; nothing
    protects the run from it, and no time limit holds."""
    timeout: Annotated[float, Field(ge=0.01, le=DAY)] = 30.0
    """Seconds that one call may take. Then its process is killed and replaced, and its completions have no score."""
    env: tuple[str, ...] = ()
    """Environment variables with secrets that the function needs, such as `[OPENAI_API_KEY]`. Its process inherits the
    others, but no variable that looks like a secret (`*_KEY`, `*_TOKEN`, `*SECRET*`, `*PASSWORD*`, `AWS_*`, …) unless
    named here or by an argument such as `api_key_env`."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory in GiB that its process may hold, with all processes that it starts. Above that they are killed: the call
    has failed, and a new process takes the next. Default: no limit."""
    calls: Literal["step", "group", "completion"] | None = None
    """What one call gets: all of a step's completions, those of a prompt, or one. A failure costs all that the call
    got. Default: what the function's file says by `CALLS`, or else `step`."""
    max_failure_rate: Fraction = 0.5
    """Stop the run when it failed on more than this fraction of the completions of its last three scorings. 1: never.
    A reward of weight 0 never stops a run."""

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> RewardConfig:
        if self.isolation == "inline" and (unread := self.changed & {"timeout", "env", "memory_gb"}):
            raise ValueError(f"{min(unread)} does nothing with isolation: inline, in the trainer's own process")
        if self.weight == 0 and "max_failure_rate" in self.changed:
            raise ValueError("max_failure_rate does nothing with weight 0: nothing is learnt from this reward")
        return self


class OptimConfig(Section):
    steps: Annotated[int, Field(gt=0, lt=MANY)]
    """Training steps: each samples, scores and updates."""
    learning_rate: Above0 = 1e-5
    """Peak learning rate."""
    optimizer: Optimizer = "adamw"
    """One of mlx.optimizers. Its state, and the weights it moves, are float32 whatever the model's dtype."""
    optimizer_args: dict[str, bool | int | float | list[float]] = {}
    """The optimizer's own arguments, such as `betas: [0.9, 0.99]` or `momentum: 0.9`."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: constant, or down on a line or half a cosine, to reach 0 one step after the last (as in
    transformers: the last step of `linear` has 1/(steps - warmup_steps) of the peak)."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises to its peak, from 1/warmup_steps of it at the first (transformers begins
    at 0, with a step that learns nothing). Of a run that is no longer than that, all steps but the last."""
    weight_decay: AtLeast0 = 0.0
    """The optimizer's weight decay, decoupled in adamw."""
    max_grad_norm: Above0 = 1.0
    """The gradient is scaled down to this norm."""
    num_iterations: Positive = 1
    """Passes over each rollout. The ratio is to the logprobs before the first update."""
    num_minibatches: Positive = 1
    """Updates in each pass: the step's prompts are divided among them (GSPO: 4)."""
    micro_batch_tokens: Tokens | Literal["auto"] = "auto"
    """Tokens, padding included, that go through the model together in the update. Changes memory and speed, not the
    gradient. `auto`: as many as fit and pay, from the plan."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Compute each layer's inside again in the backward pass: much less memory, a third more time. `auto`: where the
    plan finds that memory is short without."""
    share_prompts: bool = True
    """Run a prompt once for all its completions in training, where the model allows it. Changes memory and speed, not
    the gradient."""
    compile: bool = True
    """Compile the update on a GPU (a CPU never does): a third faster, after minutes spent at the first step."""
    max_skipped_updates: Positive = 3
    """An update whose loss or gradient is not finite is skipped; after so many in a row the run stops."""
    max_logp_difference: Annotated[float, Field(ge=1)] | None = 30.0
    """Stop the run when the sampler's logprobs differ from the trainer's, in a step's mean, by more than this many
    times what rounding explains (0.001 nats in float32, 0.01 in float16, 0.03 in bfloat16; divided by a temperature
    below 1). From 3 times on there is a warning. null: never stop."""

    @property
    def warmup(self) -> int:
        """The steps of warm-up that there is time for."""
        return min(self.warmup_steps, self.steps - 1)


class EvalConfig(Section):
    source: Name | None = None
    """Where held-out prompts come from. Default: `data.source`."""
    config: str | None = None
    """Configuration of a Hub dataset. Default: `data.config`, if the source is that of `data`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset. Default: `data.revision`, if the source is that of `data`."""
    split: str = "test"
    """Split to evaluate on."""
    every: Positive = 25
    """Steps between evaluations. There is one before the first step and one after the last, too."""
    prompts: Positive = 128
    """How many held-out prompts, from the start of the split. An answer is right if the first of `rewards` gives it 1
    or more, and left out if that gives no score."""
    samples: Positive = 4
    """Completions of each prompt for avg@k and pass@k, at `rollout.temperature`. Greedy is always measured."""


class CheckpointConfig(Section):
    every: Positive = 25
    """Steps between checkpoints. The last step always has one."""
    keep: Positive = 3
    """How many to keep: the newest. The best is kept besides."""
    metric_for_best_model: str | None = None
    """The evaluation's metric by which one is the best, highest first, such as `pass@4`. Default: avg@k."""


class WandbConfig(Section):
    project: str = "grpo"
    """Project to log to."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes the run to its folder, for `wandb sync` later. So does `online` where W&B cannot be reached."""
    entity: str | None = None
    """User or team. Default: that of the login."""
    group: str | None = None
    """Runs of one group are shown together."""
    tags: tuple[str, ...] = ()
    """To find the run by."""
    notes: str | None = None
    """What the run is for."""
    completions: NonNegative = 8
    """Rows a step in the table of completions. 0: no table."""


class CompletionsConfig(Section):
    every: Positive = 1
    """Steps between those whose completions are stored; the first one's always are."""
    groups: Positive | None = None
    """Of a stored step, keep so many prompts with all their completions, drawn from the seed. Default: all."""


class LogConfig(Section):
    wandb: WandbConfig | None = None
    """Log to Weights & Biases as well."""
    tensorboard: bool = False
    """Write TensorBoard's event files into `<run>/tensorboard` as well."""
    use: tuple[Name, ...] = ()
    """Loggers of your own, `file.py:function` or `package.module:function`: each is called with every StepMetrics and
    EvalMetrics. One that raises is left out from there on."""
    completions: CompletionsConfig | None = CompletionsConfig()
    """Which completions are stored in the run's folder, with scores, failures and advantages. null: none."""
    kl: Positive | Literal["auto"] | None = "auto"
    """Steps between measurements of `kl` in a run without a penalty, which tells it at every step. Each is one more
    forward pass of the step's completions under the reference, about a third of an update, and where whole weights
    train the reference is a second copy of them. `auto`: 10, but never where whole weights train. null: never."""


class Recipe(Section):
    """A whole run. `data`, `model`, `rewards` and `optim.steps` have no default.

    Files and folders are looked for beside the recipe, then in the working directory.
    """

    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """All randomness comes from it."""
    output_dir: Name | None = None
    """The run's folder. Default: `runs/<name of the recipe>`."""
    model: ModelConfig
    """The model that is trained, and in which precision."""
    adapter: AdapterConfig = AdapterConfig()
    """What of it trains."""
    data: DataConfig
    """Where prompts come from, and what they look like."""
    rollout: RolloutConfig = RolloutConfig()
    """How many completions are sampled, and how."""
    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1)]
    """What a completion is worth: the weighted sum of these."""
    advantage: AdvantageConfig = AdvantageConfig()
    """What a reward is compared with."""
    loss: LossConfig = LossConfig()
    """What is made of advantages: the variant of GRPO, the KL penalty, corrections."""
    optim: OptimConfig
    """How many steps, how large, and how they go through the machine."""
    eval: EvalConfig | None = None
    """Held-out prompts. Without this section nothing is evaluated."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept of a run."""
    log: LogConfig = LogConfig()
    """Where a run is written to, beside its folder."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if self.adapter.sync_reference_every is not None and self.loss.beta == 0 and self.loss.beta_end is None:
            raise ValueError("adapter.sync_reference_every does nothing while loss.beta is 0: there is no reference")
        if all(reward.weight == 0 for reward in self.rewards):
            raise ValueError(
                "rewards.0.weight: every reward has weight 0, so nothing would be learnt: give one a weight"
            )
        if self.rollout.prompts_per_step % self.optim.num_minibatches:
            raise ValueError("rollout.prompts_per_step is not divisible by optim.num_minibatches")
        if (rows := self.rollout.prompts_per_step * self.rollout.num_generations) > MANY:
            raise ValueError(
                f"rollout.num_generations × rollout.prompts_per_step are {rows:,} completions in a step, and at most "
                f"{MANY:,} are possible"
            )
        penalised = self.loss.kl_in == "reward" or self.advantage.soft_overlong_cache is not None
        if penalised and self.baseline in ("gdpo", "maxrl"):
            raise ValueError(f"advantage.baseline {self.baseline} has no meaning for penalties in the reward")
        if self.rollout.dynamic_sampling and self.baseline in ("batch", "gdpo"):
            raise ValueError(f"rollout.dynamic_sampling: with the {self.baseline} baseline uniform groups teach too")
        if (self.advantage.soft_overlong_cache or 0) >= self.rollout.max_completion_length:
            raise ValueError("advantage.soft_overlong_cache is not below rollout.max_completion_length")
        if "kl" in self.log.changed and self.has_penalty:
            raise ValueError("log.kl does nothing beside loss.beta: the penalty tells kl at every step")
        if self.checkpoint.metric_for_best_model is not None and self.eval is None:
            raise ValueError("checkpoint.metric_for_best_model does nothing without an eval section")
        local = self.eval is not None and _is_local(self.eval.source or self.data.source)
        if local and self.eval is not None and (unread := self.eval.changed & {"config", "revision"}):
            raise ValueError(f"eval.{min(unread)} is for Hub datasets; the source of held-out prompts is none")
        if self.loss.preset.surrogate == "reinforce" and max(self.optim.num_iterations, self.optim.num_minibatches) > 1:
            raise ValueError(f"loss.type {self.loss.type} has no ratio: num_iterations and num_minibatches stay 1")
        if "scale_rewards" in self.advantage.changed and self.baseline not in ("group", "leave_one_out"):
            raise ValueError(f"advantage.scale_rewards does nothing with the {self.baseline} baseline")
        return self

    @property
    def best_metric(self) -> str:
        """The evaluation's metric by which the best checkpoint is kept."""
        assert self.eval is not None
        return self.checkpoint.metric_for_best_model or f"avg@{self.eval.samples}"

    @property
    def has_penalty(self) -> bool:
        """Whether the loss or the reward has a penalty for distance from the reference."""
        return self.loss.beta > 0 or bool(self.loss.beta_end)

    @property
    def kl_every(self) -> int | None:
        """Steps between measurements of the distance from the reference, where no penalty tells it."""
        if self.has_penalty:
            return None
        if self.log.kl == "auto":
            return None if self.adapter.type == "full" else 10
        return self.log.kl

    @property
    def needs_reference(self) -> bool:
        """Whether anything is computed under the reference."""
        return self.has_penalty or self.kl_every is not None

    @property
    def baseline(self) -> Baseline:
        """What advantages are relative to: `advantage.baseline`, or what `loss.type` brings."""
        return self.advantage.baseline or self.loss.preset.baseline
