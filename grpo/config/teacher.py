"""The section `teacher`: a model whose probabilities the policy learns from, on the completions that it samples."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from grpo.config.model import ModelConfig
from grpo.config.section import Above0, Name, Section


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


TeacherModel = Annotated[ModelConfig, BeforeValidator(_named, json_schema_input_type=str | ModelConfig)]
"""A text is the model's `name`."""


class TeacherConfig(Section):
    model: TeacherModel | None = None
    """A second model, with the same tokenizer. A plain text is the model's `name`. With a teacher every group teaches,
    even a group whose rewards are all equal, so `rollout.dynamic_sampling` and `rollout.reuse` have nothing to
    replace."""
    adapter: Name | None = None
    """Folder of a saved adapter for the model that is trained, with the rank, scale and targets of the section
    `adapter`. The teacher then takes no memory beyond the adapter's own arrays. The run keeps a copy of the adapter."""
    coef: Above0 = 1.0
    """Weight of the divergence from the teacher, compared with rewards of weight 1."""
    kl: Literal["sampled", "exact", "top_k"] = "sampled"
    """How the reverse KL, KL(policy ‖ teacher), of each token is computed. `sampled`: log p(teacher) - log p(policy) of
    the sampled token is added to its advantage, times `coef` (on-policy distillation). `exact`: the KL over the whole
    vocabulary is a term of the loss, times `coef` (arXiv 2306.13649). `top_k`: like `exact`, but over the teacher's
    `top_k` most likely tokens, with all other tokens combined into one."""
    top_k: Annotated[int, Field(ge=1, le=1024)] = 64
    """Number of the teacher's most likely tokens that `kl: top_k` uses."""

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> TeacherConfig:
        if (self.model is None) == (self.adapter is None):
            raise ValueError(
                "teacher.model and teacher.adapter are two teachers: leave out one of them"
                if self.model
                else "teacher.model is missing: name a second model, or set teacher.adapter to a saved adapter"
            )
        if "top_k" in self.changed and self.kl != "top_k":
            raise ValueError(f"teacher.top_k does nothing with teacher.kl: {self.kl}: it is for teacher.kl: top_k")
        return self

    def describe(self) -> str:
        """A short description of the teacher and its KL."""
        who = f"adapter {self.adapter}" if self.model is None else self.model.name
        kl = f"top {self.top_k}" if self.kl == "top_k" else self.kl
        return f"teacher {who}, {kl} KL × {self.coef:g}"

    @property
    def in_loss(self) -> bool:
        """Whether the divergence is a term of the loss, rather than part of the advantages."""
        return self.kl != "sampled"
