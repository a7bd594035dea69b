"""The section `optim`: the number of steps, the optimizer, and how updates use memory and time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from grpo.config.section import MANY, Above0, AtLeast0, NonNegative, Positive, Section, Tokens

Optimizer = Literal["adamw", "adam", "adamax", "sgd", "lion", "adafactor", "muon", "rmsprop", "adagrad", "adadelta"]

OPTIMIZER_ARGS = frozenset({
    "alpha", "beta_1", "betas", "bias_correction", "clip_threshold", "dampening", "decay_rate", "eps", "momentum",
    "nesterov", "ns_steps", "relative_step", "rho", "scale_parameter", "warmup_init",
})  # fmt: skip
"""The names that belong in `optimizer_args`, for one optimizer or another."""


class OptimConfig(Section):
    steps: Annotated[int, Field(gt=0, lt=MANY)]
    """Training steps. Each step samples, scores and updates."""
    learning_rate: Above0 = 1e-5
    """Peak learning rate."""
    optimizer: Optimizer = "adamw"
    """An optimizer of mlx.optimizers. Its state (except for `moments`) and the weights that it updates are float32,
    whatever the model's dtype."""
    optimizer_args: dict[str, bool | int | float | list[float]] = {}
    """The optimizer's own arguments, such as `betas: [0.9, 0.99]` or `momentum: 0.9`."""
    moments: Literal["float32", "int8"] = "float32"
    """Data type of the optimizer's moments between steps. `int8`: 8 bits, with a scale for every block of 256 numbers
    (arXiv 2110.02861). Training whole weights with AdamW then takes 6 bytes less for each parameter. Arrays below 4,096
    numbers stay float32. Other programs call `optimizer: adamw` with `moments: int8` `adamw_8bit`; here, `int8` works
    with every optimizer that has moments."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling along a line (linear) or half a cosine (cosine) to reach 0
    one step after the last (as in transformers: the last step of `linear` has 1/(steps - warmup_steps) of the peak)."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises to its peak. The first step has 1/warmup_steps of the peak (transformers
    starts at 0, with a step that learns nothing). In a run of at most this many steps, the warm-up takes all steps but
    the last."""
    weight_decay: AtLeast0 = 0.0
    """The optimizer's weight decay. In adamw it is decoupled."""
    max_grad_norm: Above0 = 1.0
    """Maximum norm of the gradient. A gradient with a larger norm is scaled down to it."""
    num_iterations: Positive = 1
    """Passes over each rollout. Ratios are relative to the logprobs before the first update."""
    num_minibatches: Positive = 1
    """Updates in each pass. The step's prompts are divided among the updates (GSPO uses 4)."""
    micro_batch_tokens: Tokens | Literal["auto"] = "auto"
    """Tokens, padding included, that go through the model together in the update. This changes memory and speed, but
    not the gradient, unless `adapter.dropout` is on, because the dropout masks depend on the split. `auto`: the plan
    chooses the number of tokens that fits and is fast."""
    gradient_checkpointing: bool | Positive | Literal["auto"] = "auto"
    """Compute the activations inside each layer again in the backward pass, which takes much less memory and a third
    more time. A number: only for the first layers, this many. `auto`: only if the plan finds that memory is short
    otherwise, and with `memory.limit_gb` for as few layers as possible."""
    offload_activations: bool = False
    """On CUDA, keep the inputs of checkpointed layers in the machine's memory until the backward pass needs them. For
    long completions, these inputs take most of an update's memory on the device (8B: 295 KB per token). This changes
    memory and speed, but not the gradient. `gradient_checkpointing: auto` then means all layers, or with
    `memory.limit_gb` as few layers as possible."""
    share_prompts: bool = True
    """In training, compute each prompt once for all its completions, if the model allows it. This changes memory and
    speed, but not the gradient, unless `adapter.dropout` is on: then the completions of a prompt share the prompt's
    dropout mask."""
    pack_completions: bool = True
    """On a GPU, pack completions one after another into the same row in training, if that reduces padding and the model
    allows it (it needs `share_prompts`). This changes memory and speed, but not the gradient, unless `adapter.dropout`
    is on, because the dropout masks depend on the packing."""
    compile: bool = True
    """Compile the update on a GPU, never on a CPU. Updates are a third faster, and the first step takes some seconds
    longer."""
    max_skipped_updates: Positive = 3
    """Stop the run after this many skipped updates in a row. An update is skipped if its loss or gradient is not
    finite."""
    max_logp_difference: Annotated[float, Field(ge=1)] | None = 30.0
    """Stop the run when the mean difference between the sampler's and the trainer's logprobs in a step is more than
    this many times the difference that rounding explains (0.001 nats in float32, 0.01 in float16, 0.03 in bfloat16;
    divided by a temperature below 1). grpo warns from 3 times on. null: never stop."""

    @model_validator(mode="after")
    def _something_to_offload(self) -> OptimConfig:
        if self.offload_activations and self.gradient_checkpointing is False:
            raise ValueError(
                "offload_activations does nothing with gradient_checkpointing: false: it moves the inputs of "
                "checkpointed layers"
            )
        return self

    @property
    def warmup(self) -> int:
        """Steps of warm-up: at most all steps but the last."""
        return min(self.warmup_steps, self.steps - 1)
