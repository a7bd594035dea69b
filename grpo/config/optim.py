"""The section `optim`: how many steps, how large, and how they go through the machine."""

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
    """Training steps: each samples, scores and updates."""
    learning_rate: Above0 = 1e-5
    """Peak learning rate."""
    optimizer: Optimizer = "adamw"
    """One of mlx.optimizers. Its state (but for `moments`), and the weights it moves, are float32 whatever the model's
    dtype."""
    optimizer_args: dict[str, bool | int | float | list[float]] = {}
    """The optimizer's own arguments, such as `betas: [0.9, 0.99]` or `momentum: 0.9`."""
    moments: Literal["float32", "int8"] = "float32"
    """How the optimizer keeps its moments between steps. `int8`: in 8 bits, with a scale for every block of 256 numbers
    (arXiv 2110.02861); whole weights by AdamW take 6 bytes a parameter less. Arrays below 4,096 numbers stay float32.
    What other programs call `adamw_8bit` is `optimizer: adamw` with this: it goes with every optimizer that has
    moments."""
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
    """Updates in each pass: the step's prompts are dealt out to them (GSPO: 4)."""
    micro_batch_tokens: Tokens | Literal["auto"] = "auto"
    """Tokens, padding included, that go through the model together in the update. Changes memory and speed, not the
    gradient, unless `adapter.dropout` is on: which numbers it drops depends on the split. `auto`: as many as fit and
    pay, from the plan."""
    gradient_checkpointing: bool | Positive | Literal["auto"] = "auto"
    """Compute each layer's inside again in the backward pass: much less memory, a third more time. A number does so
    with that many layers, from the first on. `auto`: where the plan finds that memory is short without; with
    `memory.limit_gb` for as few layers as fit."""
    offload_activations: bool = False
    """On CUDA, keep checkpointed layers' inputs in the machine's memory until the backward pass asks for them: of long
    completions they are most of what an update takes on the device (8B: 295 KB a token). Changes memory and speed, not
    the gradient. `gradient_checkpointing: auto` then means all layers, or with `memory.limit_gb` as few as fit."""
    share_prompts: bool = True
    """Run a prompt once for all its completions in training, where the model allows it. Changes memory and speed, not
    the gradient, unless `adapter.dropout` is on: then the completions of a prompt share what is dropped of it."""
    pack_completions: bool = True
    """On a GPU, send completions through the model behind one another in training, where that leaves less padding and
    the model allows it (it needs `share_prompts`). Changes memory and speed, not the gradient, unless `adapter.dropout`
    is on: which numbers it drops depends on it."""
    compile: bool = True
    """Compile the update on a GPU (a CPU never does): a third faster, after some seconds more at the first step."""
    max_skipped_updates: Positive = 3
    """An update whose loss or gradient is not finite is skipped; after so many in a row the run stops."""
    max_logp_difference: Annotated[float, Field(ge=1)] | None = 30.0
    """Stop the run when the sampler's logprobs differ from the trainer's, in a step's mean, by more than this many
    times what rounding explains (0.001 nats in float32, 0.01 in float16, 0.03 in bfloat16; divided by a temperature
    below 1). From 3 times on there is a warning. null: never stop."""

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
        """The steps of warm-up that there is time for."""
        return min(self.warmup_steps, self.steps - 1)
