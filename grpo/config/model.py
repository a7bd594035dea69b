"""The sections that say what trains: `model` and `adapter`."""

from __future__ import annotations

import json
import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from grpo.config.section import MANY, Above0, Name, NonNegative, Positive, Section

OneTarget = Annotated[str, Field(min_length=1), AfterValidator(lambda name: (name,))]
"""The name of layers; it becomes a list of one."""


Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal[2, 3, 4, 5, 6, 8, "mxfp4", "nvfp4", "mxfp8"]


class ModelConfig(Section):
    name: Name
    """A folder, a Hub repository, or a built-in task's student, such as `builtin:arithmetic-student`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    dtype: Dtype = "auto"
    """Of the weights. `auto`: float32 on a CPU (where nothing else is fast), as stored on a GPU."""
    quantize: Quantize | None = None
    """Quantise the weights when they are loaded: to so many bits, in groups of 64, or to small floating point numbers
    (`mxfp4` and `mxfp8` in groups of 32, `nvfp4` of 16), where MLX computes with them. Default: they stay as stored."""
    head_dtype: Literal["auto", "float32", "model"] = "auto"
    """What the head of a 16-bit model computes logits in, for sampling and training alike. In the `model`'s own dtype
    logprobs are up to 0.08 nats off. In `float32` they are exact for the hidden states, which costs passes over a copy
    of the head's matrix, made in pieces of 64 MB (`grpo bench head` measures it); a quantised head costs nothing more.
    `auto`: float32, unless the head cannot be found. A float32 model has nothing to choose."""
    shard: Literal["tensor", "fsdp"] | None = None
    """Divide the model among processes. `tensor` gives each of them a part of every large matrix (as Megatron-LM does,
    arXiv 1909.08053), for a base that does not fit on one device: for LoRA and DoRA, and completions of one turn.
    `fsdp` spreads the weights over the processes during the update, and with `adapter.type: full` the gradient and the
    optimizer's state too (ZeRO-3, arXiv 1910.02054): for an update that does not fit on one device. Each process
    samples its share of the prompts with the whole weights, which must fit beside the keys and values.
    Default: every process holds the whole model."""
    shard_size: Annotated[int, Field(ge=2, le=MANY)] | None = None
    """How many processes divide one model. With `tensor` the step's prompts are shared out among such groups.
    Default: all."""

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> ModelConfig:
        if self.dtype == "float32" and "head_dtype" in self.changed:
            raise ValueError("model.head_dtype does nothing with model.dtype: float32, whose logits are float32")
        if self.shard_size is not None and self.shard is None:
            raise ValueError("model.shard_size does nothing without model.shard, which says how a model is divided")
        if self.revision is not None and self.name.startswith("builtin:"):
            raise ValueError(f"model.revision does nothing with {self.name}: it is for Hub repositories")
        return self


class AdapterConfig(Section):
    type: Literal["lora", "dora", "full"] = "lora"
    """What trains: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353), or the weights themselves."""
    rank: Annotated[int, Field(gt=0, le=8_192)] = 16
    """Rank of each update B A."""
    scale: Above0 = 2.0
    """The update is scale × B A (mlx-lm's convention; PEFT's alpha is scale × rank)."""
    use_rslora: bool = False
    """Make the update scale / √rank × B A, so that its size does not depend on the rank (rsLoRA, arXiv 2312.03732).
    PEFT's alpha is `scale` then."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The probability of dropping a number of what A multiplies (LoRA's dropout), in the update alone: samples, old
    logprobs and the reference come from the whole adapter. So the ratio of a step's first update is not exactly 1, and
    each step takes one more forward pass. `kl` and the clip fractions of the loss are the dropped network's; `entropy`
    is the whole network's. The masks depend on how a step is split (`optim.micro_batch_tokens`,
    `optim.share_prompts`, `optim.pack_completions`)."""
    targets: Literal["all-linear"] | OneTarget | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """`all-linear` (each linear layer of each block, experts included, what routes to them and the head excluded), or
    one name or a list of names such as `q_proj` (every layer so called) and `self_attn.q_proj`."""
    layers: Literal["all"] | tuple[NonNegative, Positive] = "all"
    """Blocks that train: `[14, 28]` is from block 14 up to, not including, block 28."""
    path: Name | None = None
    """A saved adapter's folder to go on from, in mlx-lm's format or PEFT's, with the rank, scale and targets that this
    section gives; a frozen copy of it is the reference then. Default: a fresh one."""
    sync_reference_every: Positive | None = None
    """Steps after which the reference moves to the policy. Default: it stays what it was at the start."""
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """How far it moves then: alpha × policy + (1 - alpha) × reference, array by array (arXiv 2404.09656)."""

    @property
    def multiplier(self) -> float:
        """What B A is multiplied by."""
        return self.scale / math.sqrt(self.rank) if self.use_rslora else self.scale

    @property
    def moves_reference(self) -> bool:
        """Whether the reference is not what it was at the start: the model, or the adapter in `path`."""
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
            raise ValueError("adapter.layers: the first block is not before the last")
        if "ref_model_mixup_alpha" in self.changed and self.sync_reference_every is None:
            raise ValueError("adapter.ref_model_mixup_alpha does nothing without adapter.sync_reference_every")
        return self
