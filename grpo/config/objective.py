"""The sections `advantage` and `loss`: what the policy learns from rewards."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo import presets
from grpo.config.section import LARGE, Above0, AtLeast0, Name, Section, Tokens
from grpo.presets import Baseline


class AdvantageConfig(Section):
    baseline: Baseline | None = None
    """What each reward is compared with. group: the mean of the group. leave_one_out: the mean of the other completions
    in the group (RLOO, arXiv 2402.14740). batch: the mean of the batch, whitened (REINFORCE++, arXiv 2501.03262). gdpo:
    each reward is normalized in its group, then the sum is whitened. maxrl: the mean of the group, and the difference
    is divided by this mean. Default: the baseline of the variant in `loss.type`."""
    scale_rewards: presets.Scale | None = None
    """What the difference between reward and baseline is divided by: the standard deviation in the group, the standard
    deviation in the batch, or nothing (none). Default: the choice of the variant in `loss.type`."""
    turns: Literal["trajectory", "turn"] = "trajectory"
    """What an advantage belongs to. trajectory: the whole conversation. turn: each turn of the model, from the rewards
    of this turn and all later turns, normalized over all turns of the group. Rewards for the whole conversation then
    belong to the last turn (process supervision, arXiv 2402.03300 §4.1.3). turn needs the group baseline, and a loss
    without a single ratio for the whole completion (gspo_token instead of gspo)."""
    soft_overlong_cache: Tokens | None = None
    """Penalize long completions over this many tokens before max_completion_length: the penalty goes from 0 down to -1
    (DAPO's soft overlong punishment). It counts only tokens that the model sampled. max_completion_length
    also counts tokens from tools and environments. Default: no penalty."""


class LossConfig(Section):
    type: presets.PresetName = "dapo"
    """A published variant: a value for each of the axes below, with the settings of its paper (grpo/presets.py)."""
    ratio: presets.Ratio | None = None
    """Level of the importance ratio. token: each token. sequence: the whole completion. sequence_token: the value of
    the whole completion, with each token's own gradient. Default: the variant's."""
    surrogate: presets.Surrogate | None = None
    """How the loss combines ratio and advantage. Default: the variant's."""
    normalize: presets.Normalize | None = None
    """How the loss is averaged over tokens. Default: the variant's."""
    epsilon: Above0 | None = None
    """Lower bound: the ratio is clipped at 1 - epsilon. Default: the variant's."""
    epsilon_high: Above0 | None = None
    """Upper bound: the ratio is clipped at 1 + epsilon_high. Default: the variant's, which equals epsilon for most
    variants."""
    delta: Annotated[float, Field(gt=1, le=LARGE)] | None = None
    """Dual clip: the unclipped ratio is capped at this value. The cap matters for advantages below 0 (arXiv
    2505.07291)."""
    epsilon_max: Above0 = 5.0
    """cispo's upper bound on the ratio itself."""
    sapo_temperature_pos: Above0 = 1.0
    """sapo's temperature τ for advantages above 0."""
    sapo_temperature_neg: Above0 = 1.05
    """sapo's temperature τ for all other advantages."""
    vespo_k_pos: AtLeast0 = 2.0
    """vespo's k for advantages of 0 and above."""
    vespo_lambda_pos: Above0 = 3.0
    """vespo's λ for advantages of 0 and above."""
    vespo_k_neg: AtLeast0 = 3.0
    """vespo's k for advantages below 0."""
    vespo_lambda_neg: Above0 = 2.0
    """vespo's λ for advantages below 0."""
    dppo_penalty: AtLeast0 = 0.0
    """Weight of the squared log-ratio to the sampler in dppo. 0: no such term, as in the paper; prime-rl uses 1e-3."""
    beta: AtLeast0 = 0.0
    """Weight of the KL penalty to the reference. 0: no penalty."""
    beta_end: AtLeast0 | None = None
    """beta changes linearly to this value by the last step. Default: beta stays constant."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL penalty goes. loss: it is a term of the loss. reward: it is subtracted from the reward, summed over
    the completion's tokens."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence from the sampled tokens."""
    kl_importance: bool = False
    """Multiply the KL estimate by the ratio, which makes k3's gradient equal to the gradient of the reverse KL (arXiv
    2512.02556)."""
    importance_sampling_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "none"
    """Correct for the difference between sampler and trainer: each token is weighted by its trainer / sampler
    probability. `token_`: a weight for each token; `sequence_`: a weight for the whole completion. `_truncate`: weights
    are truncated at the cap; `_mask`: tokens with weights outside the bounds are left out. vespo includes the token
    weights in its own weight. dppo does not need the correction, because its ratio is to the sampler already."""
    importance_sampling_cap: Above0 = 3.0
    """Upper bound of the importance sampling weight."""
    importance_sampling_floor: AtLeast0 = 0.0
    """Lower bound of the importance sampling weight, for the `_mask` forms."""
    off_policy_mask_threshold: Above0 | None = None
    """Leave out a completion with an advantage below 0 if the mean logprob of its tokens has fallen by more than this
    since it was sampled (arXiv 2512.02556). Default: no completion is left out."""
    mask_truncated_completions: bool = False
    """Leave completions that were ended by a limit out of the loss (DAPO's overlong filtering). Their rewards still
    count in the mean of their group."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Train only on this fraction of the step's tokens: the tokens with the highest entropy (arXiv 2506.01939)."""
    entropy_coef: AtLeast0 = 0.0
    """Weight of an entropy bonus for each token, averaged in the same way as the loss."""
    use: Name | None = None
    """Your own loss, which replaces the surrogate, `file.py:function`, `file.py` (if it has one function) or
    `package.module:function`: (current, batch, cfg) -> per_token_loss. `current` and `per_token_loss` are [B, T];
    `batch` is a grpo.types.Batch."""

    @property
    def preset(self) -> presets.Preset:
        """The variant, with the settings that this recipe replaces."""
        preset = presets.PRESETS[self.type]
        symmetric = preset.epsilon == preset.epsilon_high
        bounds = {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high or (self.epsilon if symmetric else None)}
        axes = {"ratio": self.ratio, "surrogate": self.surrogate, "normalize": self.normalize}
        given: dict[str, Any] = {name: value for name, value in {**axes, **bounds}.items() if value is not None}
        return replace(preset, **given)

    @property
    def corrects_samplers(self) -> bool:
        """Whether the loss corrects for a sampler that differs from the policy."""
        return self.importance_sampling_correction != "none" or (self.use is None and self.preset.surrogate == "dppo")

    @model_validator(mode="after")
    def _every_setting_does_something(self) -> LossConfig:
        surrogate = self.preset.surrogate
        if self.beta == 0 and self.beta_end is None:
            for name in ("kl_in", "kl_estimator", "kl_importance"):
                if name in self.changed:
                    raise ValueError(f"loss.{name} does nothing while loss.beta is 0")
        form = self.importance_sampling_correction
        for name, reads in (("importance_sampling_cap", form != "none"), ("importance_sampling_floor", "mask" in form)):
            if name in self.changed and not reads:
                raise ValueError(f"loss.{name} does nothing with importance_sampling_correction: {form}")
        if self.use is None and surrogate == "dppo" and form != "none":
            raise ValueError(
                "loss.importance_sampling_correction does nothing with dppo, whose ratio is to the sampler already: "
                "leave it out"
            )
        if self.use is None and surrogate == "vespo" and form.startswith("sequence"):
            raise ValueError(
                f"loss.importance_sampling_correction: vespo needs a weight for each token, and {form} has a single "
                "weight for the whole completion. Use token_truncate or token_mask"
            )
        if self.beta_end == self.beta:
            raise ValueError("loss.beta_end does nothing: it equals loss.beta")
        if self.importance_sampling_floor >= self.importance_sampling_cap:
            raise ValueError(
                "loss.importance_sampling_floor must be below importance_sampling_cap: otherwise no token would be left"
            )
        if self.delta is not None and self.delta <= 1 + self.preset.epsilon_high:
            raise ValueError("loss.delta must be above 1 + epsilon_high: it would clip what the upper bound allows")
        if self.use is not None and (
            unread := self.changed & {"ratio", "surrogate", *presets.READ_BY} - {"epsilon", "epsilon_high"}
        ):
            raise ValueError(f"loss.{min(unread)} does nothing with loss.use, which replaces the surrogate")
        if self.kl_in == "reward" and self.kl_importance:
            raise ValueError("loss.kl_importance does nothing with kl_in: reward")
        for name in self.changed & set(presets.READ_BY):
            if surrogate not in presets.READ_BY[name]:
                known = ", ".join(presets.READ_BY[name])
                raise ValueError(
                    f"loss.{name} does nothing with the {surrogate} surrogate of {self.type}, only with {known}"
                )
        if self.preset.ratio != "token" and surrogate not in ("clip", "cispo", "sapo"):
            raise ValueError(f"loss.ratio: the {surrogate} surrogate has its own ratio: leave loss.ratio at token")
        return self
