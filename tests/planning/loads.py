"""What a recipe asks of a machine, for tests that plan it."""

from grpo.config import Recipe
from grpo.planning.workload import Workload


def workload(cfg: Recipe, prompt_length: int, longest: int | None = None) -> Workload:
    return Workload(cfg.optim, cfg.rollout, cfg.adapter, cfg.eval, prompt_length, longest or prompt_length)
