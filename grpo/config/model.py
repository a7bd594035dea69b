"""The sections that say what trains: `model` and `adapter`."""

from __future__ import annotations

import json
import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from grpo.config.section import MANY, Above0, Name, NonNegative, Positive, Section

OneTarget = Annotated[str, Field(min_length=1), AfterValidator(lambda name: (name,))]
"""A single name of layers, which becomes a tuple with one name."""


Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal[2, 3, 4, 5, 6, 8, "mxfp4", "nvfp4", "mxfp8"]


class ModelConfig(Section):
    name: Name
    """A folder, a Hub repository, or the student model of a built-in task, such as `builtin:arithmetic-student`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    dtype: Dtype = "auto"
    """Data type of the weights. `auto`: float32 on a CPU (where no other type is fast), the stored type on a GPU."""
    quantize: Quantize | None = None
    """Quantize the weights when they are loaded: to this many bits, in groups of 64, or to a small floating-point
    format (`mxfp4` and `mxfp8` in groups of 32, `nvfp4` in groups of 16) on devices where MLX computes with it.
    Default: the weights stay as stored."""
    head_dtype: Literal["auto", "float32", "model"] = "auto"
    """Data type in which the head of a 16-bit model computes logits, for sampling and training alike. With `model`, the
    model's own dtype, logprobs are up to 0.08 nats off. With `float32`, they are exact for the hidden states, which
    costs passes over a copy of the head's matrix, made in pieces of 64 MB (`grpo bench head` measures it); a quantized
    head costs nothing more. `auto`: float32, unless grpo cannot find the head. A float32 model always computes float32
    logits."""
    shard: Literal["tensor", "fsdp"] | None = None
    """Divide the model among processes. `tensor` gives each process a part of every large matrix (as Megatron-LM does,
    arXiv 1909.08053), for a base model that does not fit on one device. It works with LoRA and DoRA, and with
    completions of one turn. `fsdp` spreads the weights over the processes during the update, and with `adapter.type:
    full` also the gradient and the optimizer's state (ZeRO-3, arXiv 1910.02054), for an update that does not fit on one
    device. Each process samples its share of the prompts with the whole weights, which must fit in memory next to
    the keys and values. Default: every process holds the whole model."""
    shard_size: Annotated[int, Field(ge=2, le=MANY)] | None = None
    """Number of processes that divide one model. With `tensor`, the step's prompts are divided among groups of this
    many processes. Default: all processes."""

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> ModelConfig:
        if self.dtype == "float32" and "head_dtype" in self.changed:
            raise ValueError("model.head_dtype does nothing with model.dtype: float32, whose logits are always float32")
        if self.shard_size is not None and self.shard is None:
            raise ValueError("model.shard_size does nothing without model.shard, which decides how a model is divided")
        if self.revision is not None and self.name.startswith("builtin:"):
            raise ValueError(f"model.revision does nothing with {self.name}: it is for Hub repositories")
        return self


class AdapterConfig(Section):
    type: Literal["lora", "dora", "full"] = "lora"
    """What trains: a LoRA adapter (arXiv 2106.09685), a DoRA adapter (arXiv 2402.09353), or the weights themselves
    (full)."""
    rank: Annotated[int, Field(gt=0, le=8_192)] = 16
    """Rank of each update B A."""
    scale: Above0 = 2.0
    """The update is scale × B A (mlx-lm's convention; PEFT's alpha is scale × rank)."""
    use_rslora: bool = False
    """Use scale / √rank × B A as the update, so that its size does not depend on the rank (rsLoRA, arXiv 2312.03732).
    PEFT's alpha is then `scale`."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which LoRA's dropout drops each element of the input of A. Dropout applies in the update alone:
    samples, old logprobs and the reference come from the whole adapter. So the ratio of a step's first update is not
    exactly 1, and each step needs one more forward pass. `kl` and the clip fractions of the loss are measured with
    dropout, `entropy` without. The masks depend on how a step is split (`optim.micro_batch_tokens`,
    `optim.share_prompts`, `optim.pack_completions`)."""
    targets: Literal["all-linear"] | OneTarget | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """The linear layers that train. `all-linear`: every linear layer of every block, including experts, excluding
    routers and the head. Or one name or a list of names, such as `q_proj` (every layer of this name) and
    `self_attn.q_proj`."""
    layers: Literal["all"] | tuple[NonNegative, Positive] = "all"
    """Blocks that train: `[14, 28]` trains block 14 up to, but not including, block 28."""
    path: Name | None = None
    """Folder of a saved adapter to start from, in mlx-lm's or PEFT's format, with the rank, scale and targets of this
    section. The reference is then a frozen copy of that adapter. Default: a new adapter."""
    sync_reference_every: Positive | None = None
    """Move the reference toward the policy after every this many steps. Default: the reference stays as it was at the
    start."""
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """How far the reference moves each time: the new reference is alpha × policy + (1 - alpha) × reference, array by
    array (arXiv 2404.09656)."""

    @property
    def multiplier(self) -> float:
        """The factor of B A in the update."""
        return self.scale / math.sqrt(self.rank) if self.use_rslora else self.scale

    @property
    def moves_reference(self) -> bool:
        """Whether the reference moves away from its start, which is the model or the adapter in `path`."""
        return self.sync_reference_every is not None

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> AdapterConfig:
        if self.type == "full" and (unread := self.changed & {"rank", "scale", "use_rslora", "dropout", "targets"}):
            kept = {"type": "full", **{name: getattr(self, name) for name in sorted(self.changed - unread - {"type"})}}
            section = ", ".join(
                f"{name}: {value if name == 'type' else json.dumps(value)}" for name, value in kept.items()
            )
            raise ValueError(
                f"adapter.{min(unread)} does nothing with adapter.type: full: leave it out of the file, or replace the "
                f"whole section on the command line: 'adapter={{{section}}}'"
            )
        if self.layers != "all" and self.layers[0] >= self.layers[1]:
            raise ValueError("adapter.layers: the first number must be below the second")
        if "ref_model_mixup_alpha" in self.changed and self.sync_reference_every is None:
            raise ValueError("adapter.ref_model_mixup_alpha does nothing without adapter.sync_reference_every")
        return self
