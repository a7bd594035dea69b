"""`grpo.optimizer`: optimizers for the weights of a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo.config import LossConfig, OptimConfig
from grpo.config.optim import Optimizer
from grpo.config.section import MANY
from grpo.door.checks import kind_of
from grpo.errors import UserError
from grpo.objective.loss import CustomLoss
from grpo.recipes import with_settings
from grpo.training.algorithms import make_optimizer
from grpo.training.gradients import Gradient
from grpo.training.optimizer import Float32Optimizer
from grpo.training.update import Update, Updater

if TYPE_CHECKING:
    from grpo.door.policy import LoadedPolicy

SAID_BY = "grpo.optimizer"
OF_THE_LOOP = {
    "micro_batch_tokens",
    "gradient_checkpointing",
    "offload_activations",
    "share_prompts",
    "pack_completions",
    "num_minibatches",
    "max_logp_difference",
}
"""Settings of a recipe's `optim` that do not belong to an optimizer."""


def optimizer(name: Optimizer = "adamw", **settings: Any) -> PolicyOptimizer:
    """Create an optimizer of `mlx.optimizers`, by its name. Its weights and state are float32 for models of any dtype.

    `settings` are the settings of a recipe's section `optim`: `learning_rate` (1e-5), `weight_decay` (0),
    `max_grad_norm` (1.0: the gradient is scaled down to this norm), `optimizer_args`, `moments` ("float32"; "int8": 8
    bits between updates, for arrays of 4,096 numbers or more), `num_iterations` (1: passes over the batches in each
    `policy.update`), and `lr_scheduler_type` or `warmup_steps`, which need `steps`, the planned number of updates.

    Raises UserError for an unknown name or setting, and for an argument that the optimizer does not have.

    >>> opt = grpo.optimizer("adamw", learning_rate=1e-3, optimizer_args={"betas": [0.9, 0.99]})
    >>> opt.learning_rate, opt.steps_done
    (0.001, 0)
    """
    if wrong := OF_THE_LOOP & set(settings):
        raise UserError(f"{SAID_BY}: {min(wrong)} is not a setting of an optimizer: use it in a recipe (grpo.recipe)")
    if "steps" not in settings and (early := {"lr_scheduler_type", "warmup_steps"} & set(settings)):
        raise UserError(f"{SAID_BY}: {min(early)} needs steps=..., the planned number of updates")
    cfg = with_settings(OptimConfig(steps=MANY - 1), {"optimizer": name, **settings}, SAID_BY)
    make_optimizer(cfg)  # refuses unknown arguments
    return PolicyOptimizer(cfg)


class PolicyOptimizer:
    """Updates the weights of one policy, the first that it is used with. It keeps its state between updates."""

    def __init__(self, cfg: OptimConfig) -> None:
        self.cfg = cfg
        self.steps_done = 0
        self._policy: LoadedPolicy | None = None
        self._own: Float32Optimizer | None = None
        self._updaters: dict[tuple[str, CustomLoss | None], Updater] = {}

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last update; before the first update, the peak."""
        return self.cfg.learning_rate if self._own is None else float(self._own.learning_rate.item())

    def update(self, policy: LoadedPolicy, gradient: Gradient) -> Update:
        """Apply a gradient of `policy.gradient`, clipped to `max_grad_norm`, to the policy's weights.

        A gradient that is not finite, or exactly 0, is not applied: the result's `skipped` or `without_signal` is 1.
        The gradient's arrays are consumed. Raises UserError for a value that is not a gradient, and RunError after
        `max_skipped_updates` consecutive updates that are not finite.
        """
        if not isinstance(gradient, Gradient):
            raise UserError(
                f"opt.update: expected a gradient of policy.gradient(batches, loss), got {kind_of(gradient)}; to "
                "update with batches, call policy.update(batches, opt)"
            )
        updater = self.updater(policy, LossConfig(), None)
        self.steps_done += 1
        return updater.apply(gradient, self.steps_done)

    def updater(self, policy: LoadedPolicy, loss: LossConfig, custom: CustomLoss | None) -> Updater:
        """Return the updater of this policy for this loss. All updaters share one optimizer state."""
        if not hasattr(policy, "inner"):
            raise UserError(
                f"opt.update: expected a policy of grpo.load as the first argument, got {kind_of(policy)}: "
                "opt.update(policy, gradient)"
            )
        if self._policy is not None and self._policy is not policy:
            raise UserError(
                "this optimizer already updates another policy: create one per policy with grpo.optimizer(...)"
            )
        self._policy = policy
        key = (repr(loss), custom)
        if key not in self._updaters:
            self._own = self._own or Float32Optimizer(self.cfg, policy.model.trainable_parameters())
            made = Updater(policy.inner, self.cfg, loss, custom, dropout_seed=policy.dropout_seed, optimizer=self._own)
            self._updaters[key] = made
        return self._updaters[key]
