"""Memory of a teacher: a second model's weights and forward pass, the teacher's values of tokens, and the KL."""

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
"""Factor for the copies of a chunk's logits in memory if the KL to a teacher is computed too. Measured on a CPU with
20,000 logits: 1.43 to 1.51 (exact), 1.22 (the 64 likeliest)."""


@dataclass(frozen=True, slots=True)
class TeacherNeeds:
    """The memory that a teacher needs.

    weights  bytes of a second model's weights
    token    bytes of the teacher's values per token
    copies   factor for the copies of a chunk's logits
    asking   footprint of a second model's forward pass

    A teacher that is an adapter state counts among the states, not here. Its forward pass takes less than the update.
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
        """From a recipe's teacher, the trained model, and the second model if there is one. Only shapes are used.

        `gpu`, `fused`: whether the machine has a GPU, and whether its attention keeps no scores.
        """
        if cfg is None:
            return cls()
        said, copies = _said(cfg, model if second is None else second), MORE_COPIES[cfg.kl]
        if second is None:
            return cls(0, said, copies)
        weights = sum(array.nbytes for _, array in tree_flatten(second.parameters()))
        return cls(weights, said, copies, _asking(second, gpu, fused))

    def stays(self, load: Workload) -> dict[str, int]:
        """Bytes that stay in memory: the weights all the time, and the teacher's values from its forward pass until the
        step's last update."""
        tokens = load.rows * (load.own + load.rollout.max_completion_length)
        return {"teacher": self.weights + self.token * tokens} if self.token else {}

    def beside(self, footprint: Footprint) -> Footprint:
        """The footprint of an update with the KL to the teacher, and of the second model's forward pass before it."""
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
    """Bytes of the teacher's values per token: a logprob, a hidden state, or the likeliest ids and logprobs."""
    match cfg.kl:
        case "sampled":
            return mx.float32.size
        case "exact":
            return int(talking(teacher).args.hidden_size) * dtype_of(teacher).size
        case "top_k":
            return (2 * cfg.top_k + 1) * mx.float32.size
