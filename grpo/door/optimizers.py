"""`grpo.optimizer`: what moves the weights of a policy."""

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
"""Settings of a recipe's `optim` that are no optimizer's."""


def optimizer(name: Optimizer = "adamw", **settings: Any) -> PolicyOptimizer:
    """An optimizer: one of `mlx.optimizers` by its name, with float32 weights and state for models of any dtype.

    `settings` are those of a recipe's section `optim`: `learning_rate` (1e-5), `weight_decay` (0), `max_grad_norm`
    (1.0: the gradient is scaled down to this norm), `optimizer_args`, `moments` ("float32"; "int8": in 8 bits between
    updates, for arrays of 4,096 numbers or more), `num_iterations` (1: passes over the batches in each
    `policy.update`), and `lr_scheduler_type` or `warmup_steps`, which need `steps`, the number of updates to come.

    Raises UserError for an unknown name or setting, and for an argument that the optimizer does not have.

    >>> opt = grpo.optimizer("adamw", learning_rate=1e-3, optimizer_args={"betas": [0.9, 0.99]})
    >>> opt.learning_rate, opt.steps_done
    (0.001, 0)
    """
    if wrong := OF_THE_LOOP & set(settings):
        raise UserError(f"{SAID_BY}: {min(wrong)} is no setting of an optimizer: it belongs to a recipe (grpo.recipe)")
    if "steps" not in settings and (early := {"lr_scheduler_type", "warmup_steps"} & set(settings)):
        raise UserError(f"{SAID_BY}: {min(early)} needs steps=..., the number of updates that there will be")
    cfg = with_settings(OptimConfig(steps=MANY - 1), {"optimizer": name, **settings}, SAID_BY)
    make_optimizer(cfg)  # refuses arguments that it does not have
    return PolicyOptimizer(cfg)


class PolicyOptimizer:
    """Moves the weights of one policy: the first one that it is used with. Its state is kept from update to update."""

    def __init__(self, cfg: OptimConfig) -> None:
        self.cfg = cfg
        self.steps_done = 0
        self._policy: LoadedPolicy | None = None
        self._own: Float32Optimizer | None = None
        self._updaters: dict[tuple[str, CustomLoss | None], Updater] = {}

    @property
    def learning_rate(self) -> float:
        """Of the last update, or the peak before the first."""
        return self.cfg.learning_rate if self._own is None else float(self._own.learning_rate.item())

    def update(self, policy: LoadedPolicy, gradient: Gradient) -> Update:
        """One step on the policy's weights by a gradient of `policy.gradient`, clipped to `max_grad_norm`.

        A gradient that is not finite, or exactly 0, is not applied: the result's `skipped` or `without_signal` is 1.
        The gradient's arrays are used up. Raises UserError for what is no gradient, and RunError after
        `max_skipped_updates` in a row that are not finite.
        """
        if not isinstance(gradient, Gradient):
            raise UserError(
                f"opt.update: expected a gradient of policy.gradient(batches, loss), got {kind_of(gradient)}; an "
                "update by batches is policy.update(batches, opt)"
            )
        updater = self.updater(policy, LossConfig(), None)
        self.steps_done += 1
        return updater.apply(gradient, self.steps_done)

    def updater(self, policy: LoadedPolicy, loss: LossConfig, custom: CustomLoss | None) -> Updater:
        """What makes the updates of this policy by this loss. All of them share one optimizer's state."""
        if not hasattr(policy, "inner"):
            raise UserError(
                f"opt.update: expected a policy of grpo.load first, got {kind_of(policy)}: opt.update(policy, gradient)"
            )
        if self._policy is not None and self._policy is not policy:
            raise UserError("this optimizer already moves another policy: make one for each, grpo.optimizer(...)")
        self._policy = policy
        key = (repr(loss), custom)
        if key not in self._updaters:
            self._own = self._own or Float32Optimizer(self.cfg, policy.model.trainable_parameters())
            made = Updater(policy.inner, self.cfg, loss, custom, dropout_seed=policy.dropout_seed, optimizer=self._own)
            self._updaters[key] = made
        return self._updaters[key]
