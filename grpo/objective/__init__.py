"""The math of GRPO: arrays in, arrays out. No function here sees a model."""

from grpo.objective.advantages import advantages, total_rewards
from grpo.objective.loss import policy_loss
from grpo.objective.metrics import combine_metrics
from grpo.objective.weights import token_weights, weights_of_chosen

__all__ = ["advantages", "combine_metrics", "policy_loss", "token_weights", "total_rewards", "weights_of_chosen"]
