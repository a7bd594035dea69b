"""What a run will do and need, in numbers, before it does it."""

from __future__ import annotations

from dataclasses import dataclass

from mlx.utils import tree_flatten

from grpo.backend.device import memory_bytes
from grpo.config import Recipe
from grpo.model.logprobs import CHUNK
from grpo.model.policy import Policy


@dataclass(frozen=True, slots=True)
class Plan:
    """Counts, and bytes by what they are for."""

    steps: int
    prompts: int
    rows: int
    tokens: int
    parameters: int
    trained: int
    stays: dict[str, int]
    phases: dict[str, int]
    memory: int
    prompt_length: int

    @property
    def total(self) -> int:
        """Estimated peak: what stays, and the larger of the two phases."""
        return sum(self.stays.values()) + max(self.phases.values())

    def lines(self) -> list[str]:
        parts = ", ".join(f"{name} {_size(size)}" for name, size in {**self.stays, **self.phases}.items() if size)
        memory = f"memory about {_size(self.total)} of {_size(self.memory)}: {parts}"
        if not all(self.phases.values()):
            memory = f"memory cannot be estimated for this architecture; of {_size(self.memory)}: {parts}"
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return [
            f"{steps} of {self.prompts} prompts, {self.rows} completions, at most {self.tokens:,} tokens",
            f"trains {self.trained:,} of {self.parameters:,} parameters",
            memory,
        ]


def make_plan(cfg: Recipe, policy: Policy, prompt_length: int) -> Plan:
    """The plan of a recipe for prompts of up to `prompt_length` tokens.

    The estimate counts weights, adapter (with gradient and AdamW's two moments), the generator's buffers, and the
    update's activations: about 34 hidden-sized arrays a layer (Korthikanti 2022, arXiv 2205.05198, without
    attention scores, which are counted apart) and a chunk of logits with its gradient.
    """
    model = policy.model
    parameters = tree_flatten(model.parameters())
    trained = tree_flatten(model.trainable_parameters())
    rows, length = (
        cfg.rollout.prompts_per_step * cfg.rollout.num_generations,
        cfg.rollout.max_completion_length,
    )
    slots, context = min(rows, cfg.rollout.max_concurrency), prompt_length + length
    micro = min(rows, cfg.optim.micro_batch_size)
    shape = _Shape(policy)
    width = policy.dtype.size
    activations = micro * context * shape.layers * (17 * shape.hidden + shape.heads * context) * width
    return Plan(
        steps=cfg.optim.steps,
        prompts=cfg.rollout.prompts_per_step,
        rows=rows,
        tokens=rows * context,
        parameters=sum(array.size for _, array in parameters) - sum(array.size for _, array in trained),
        trained=sum(array.size for _, array in trained),
        stays={
            "weights": sum(array.nbytes for _, array in parameters),
            "adapter and optimiser": 3 * sum(array.nbytes for _, array in trained),
        },
        phases={
            "rollout cache": 2 * slots * context * shape.layers * shape.kv_width * width,
            "update": activations + 3 * 4 * min(CHUNK, micro * length) * shape.vocabulary,
        },
        memory=memory_bytes(),
        prompt_length=prompt_length,
    )


class _Shape:
    """A model's dimensions, from the arguments that mlx-lm's models keep; 0 where they go by another name."""

    def __init__(self, policy: Policy) -> None:
        args = policy.model.args
        self.layers = len(policy.model.layers)
        self.hidden = int(getattr(args, "hidden_size", 0))
        self.heads = int(getattr(args, "num_attention_heads", 0))
        self.vocabulary = int(getattr(args, "vocab_size", 0))
        head = getattr(args, "head_dim", None) or self.hidden // max(1, self.heads)
        self.kv_width = int(getattr(args, "num_key_value_heads", None) or self.heads) * int(head)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
