"""What a teacher takes of memory: a second model's weights and forward pass, what it says of tokens, and its KL."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.config import TeacherConfig
from grpo.errors import UserError
from grpo.model.head import talking
from grpo.model.outline import costs_of
from grpo.model.quantized import dtype_of
from grpo.planning.activations import forward_footprint
from grpo.planning.footprint import Footprint
from grpo.planning.workload import Workload

MORE_COPIES = {"sampled": 1.0, "exact": 1.5, "top_k": 1.25}
"""Times as many of a chunk's logits are held where its KL is computed besides, as measured on a CPU: of 20,000 logits
1.43 to 1.51 (exact) and 1.22 times (64 likeliest)."""


@dataclass(frozen=True, slots=True)
class TeacherNeeds:
    """Bytes of a second model's weights, and of what a teacher says of each token; how many times the copies of logits.

    `asking` is a second model's forward pass. Another state of the adapter counts among the states, and not here: its
    forward pass takes less than the update.
    """

    weights: int = 0
    token: int = 0
    copies: float = 1.0
    asking: Footprint | None = None

    @classmethod
    def of(
        cls,
        cfg: TeacherConfig | None,
        model: nn.Module,
        second: nn.Module | None = None,
        gpu: bool = True,
        fused: bool = False,
    ) -> TeacherNeeds:
        """By a recipe's teacher, the model that is trained, and the second model if there is one: shapes are enough.

        `gpu`, `fused`: whether the machine has a GPU, and attention on it keeps no scores.
        """
        if cfg is None:
            return cls()
        said, copies = _said(cfg, model if second is None else second), MORE_COPIES[cfg.kl]
        if second is None:
            return cls(0, said, copies)
        weights = sum(array.nbytes for _, array in tree_flatten(second.parameters()))
        return cls(weights, said, copies, _asking(second, gpu, fused))

    def stays(self, load: Workload) -> dict[str, int]:
        """What is held: the weights all the time, and the rest from a step's forward pass on until its last update."""
        tokens = load.rows * (load.own + load.rollout.max_completion_length)
        return {"teacher": self.weights + self.token * tokens} if self.token else {}

    def beside(self, footprint: Footprint) -> Footprint:
        """The footprint of an update that computes its KL, or of the second model's forward pass before it."""
        most, chunk = (int(self.copies * copies) for copies in (footprint.most_copies, footprint.logit_copies))
        return replace(footprint, most_copies=most, logit_copies=chunk, also=self.asking)


NONE = TeacherNeeds()


def _asking(second: nn.Module, gpu: bool, fused: bool) -> Footprint | None:
    """The footprint of a second model's forward pass; None for an architecture whose sizes are not known."""
    try:
        return forward_footprint(costs_of(second), fused, gpu)
    except UserError:
        return None


def _said(cfg: TeacherConfig, teacher: nn.Module) -> int:
    """Bytes of what is kept of a token: a logprob, hidden states, or ids and logprobs of the likeliest tokens."""
    match cfg.kl:
        case "sampled":
            return mx.float32.size
        case "exact":
            return int(talking(teacher).args.hidden_size) * dtype_of(teacher).size
        case "top_k":
            return (2 * cfg.top_k + 1) * mx.float32.size
