"""Memory of models among the rewards: weights during the whole run, activations while a step is scored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.nn as nn

from grpo.config import JudgeConfig, RewardModelConfig
from grpo.model.costs import Costs
from grpo.model.outline import costs_of
from grpo.planning.workload import Workload

OF_HIDDEN, OF_QUERIES, OF_KEYS, OF_INNER, OF_SCORES = 5.1, 7.7, 5.2, 3.0, 1.1
"""Numbers in memory simultaneously, for each number of a layer's input, queries, keys, and the inside of its
feed-forward part, and for each attention score if attention is not fused. Fitted to measurements of Qwen3 shapes on a
CPU, of 2 and 6 layers (the depth makes no difference), rows of 16 to 1,024 tokens: 5 shapes, all within 5 %."""

COPIES = 3
"""Float32 copies of a judge's logits in memory simultaneously."""
ASKED_TOKENS = 64
"""Approximate number of tokens in a judge's question besides prompt and completion."""


@dataclass(frozen=True, slots=True)
class RewardModelCosts:
    """The memory of a reward model or a judge: bytes of its own weights, and of a forward pass per token, per pair of
    tokens that attention scores, and per row of logits."""

    cfg: RewardModelConfig | JudgeConfig
    costs: Costs
    weights: int
    token: float
    pair: float
    row: int

    @classmethod
    def of(cls, model: nn.Module, cfg: RewardModelConfig | JudgeConfig, fused: bool) -> RewardModelCosts:
        """From a model's shapes and dtypes: a classifier's, or the policy's for a judge. `fused`: attention keeps no
        scores, as on CUDA."""
        costs = costs_of(model)
        inner = max(product.used * product.outputs for product in costs.products)
        queries, keys = costs.heads * costs.head_dim, costs.kv_heads * costs.head_dim
        token = OF_HIDDEN * costs.hidden + OF_QUERIES * queries + OF_KEYS * keys + OF_INNER * inner
        pair = 0.0 if fused else costs.itemsize * OF_SCORES * costs.heads
        weights, row = (0, COPIES * 4 * costs.head.outputs) if isinstance(cfg, JudgeConfig) else (costs.weight_bytes, 0)
        return cls(cfg, costs, weights, costs.itemsize * token, pair, row)

    def longest(self, load: Workload) -> int:
        """Tokens of the longest conversation, as the policy's tokenizer counts them; the classifier may differ."""
        asked = ASKED_TOKENS if isinstance(self.cfg, JudgeConfig) else 0
        length = asked + load.longest + load.own + load.rollout.max_completion_length
        return min(length, self.cfg.max_length or length)

    def at_once(self, load: Workload) -> int:
        """Bytes of the largest batch: as many of the longest conversations as `batch_tokens` allows, at least one."""
        length = self.longest(load)
        rows = min(load.need().rows, max(1, self.cfg.batch_tokens // length))
        return int(rows * (length * (self.token + self.pair * length) + self.row))


@dataclass(frozen=True, slots=True)
class Graders:
    """All reward models of a run."""

    models: tuple[RewardModelCosts, ...] = ()

    @classmethod
    def of(cls, models: Iterable[tuple[nn.Module, RewardModelConfig | JudgeConfig]], fused: bool) -> Graders:
        return cls(tuple(RewardModelCosts.of(model, cfg, fused) for model, cfg in models))

    def stays(self) -> dict[str, int]:
        """Bytes that stay in memory during the whole run, by purpose."""
        weights = sum(one.weights for one in self.models)
        return {"reward models": weights} if weights else {}

    def phases(self, load: Workload) -> dict[str, int]:
        """Additional bytes while completions are scored: one model after the other, between rollout and update."""
        return {"reward models' pass": max(one.at_once(load) for one in self.models)} if self.models else {}


UNGRADED = Graders()
