"""The sections that say what is learnt from rewards: `advantage` and `loss`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo import presets
from grpo.config.section import LARGE, Above0, AtLeast0, Name, Section, Tokens
from grpo.presets import Baseline


class AdvantageConfig(Section):
    baseline: Baseline | None = None
    """What rewards are compared with. group: the group's mean; leave_one_out: the mean of the others in the group
    (RLOO, arXiv 2402.14740); batch: the batch's mean, whitened (REINFORCE++, arXiv 2501.03262); gdpo: each reward
    normalised in its group, summed, whitened; maxrl: the group's mean, divided by it. Default: that of `loss.type`."""
    scale_rewards: presets.Scale | None = None
    """What rewards less their baseline are divided by: their deviation in the group, in the batch, or nothing (none).
    Default: that of `loss.type`."""
    turns: Literal["trajectory", "turn"] = "trajectory"
    """What an advantage is of: the whole conversation (trajectory), or each turn of the model (turn): the rewards of
    this turn and the later ones, normalised over all turns of the group; other rewards belong to the last turn (process
    supervision, arXiv 2402.03300 §4.1.3). turn needs the group baseline, and a loss that is not of whole completions
    (gspo_token in the place of gspo)."""
    soft_overlong_cache: Tokens | None = None
    """Punish length over the last so many tokens before max_completion_length, from 0 down to -1 (DAPO's soft overlong
    punishment). It counts what the model sampled; max_completion_length counts besides what tools and environments
    answer. Default: not at all."""


class LossConfig(Section):
    type: presets.PresetName = "dapo"
    """A published variant: a point on the axes below, with its paper's settings (grpo/presets.py)."""
    ratio: presets.Ratio | None = None
    """Ratio of each token or of the sequence. Default: the variant's."""
    surrogate: presets.Surrogate | None = None
    """What is made of ratio and advantage. Default: the variant's."""
    normalize: presets.Normalize | None = None
    """How tokens are averaged. Default: the variant's."""
    epsilon: Above0 | None = None
    """Lower bound: the ratio is clipped at 1 - epsilon. Default: the variant's."""
    epsilon_high: Above0 | None = None
    """Upper bound: the ratio is clipped at 1 + epsilon_high. Default: the variant's, which is epsilon for most."""
    delta: Annotated[float, Field(gt=1, le=LARGE)] | None = None
    """Dual clip: the unclipped ratio is capped here, which binds for advantages below 0 (arXiv 2505.07291)."""
    epsilon_max: Above0 = 5.0
    """cispo's ceiling on the ratio itself."""
    sapo_temperature_pos: Above0 = 1.0
    """sapo's τ for advantages above 0."""
    sapo_temperature_neg: Above0 = 1.05
    """sapo's τ for the others."""
    vespo_k_pos: AtLeast0 = 2.0
    """vespo's k for advantages of 0 and above."""
    vespo_lambda_pos: Above0 = 3.0
    """vespo's λ for advantages of 0 and above."""
    vespo_k_neg: AtLeast0 = 3.0
    """vespo's k for advantages below 0."""
    vespo_lambda_neg: Above0 = 2.0
    """vespo's λ for advantages below 0."""
    dppo_penalty: AtLeast0 = 0.0
    """dppo's weight of the squared log-ratio to the sampler. 0: none, as in its paper; prime-rl has 1e-3."""
    beta: AtLeast0 = 0.0
    """Weight of the KL penalty to the reference. 0: no penalty."""
    beta_end: AtLeast0 | None = None
    """beta moves on a line to this by the last step. Default: it stays."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the penalty goes: a term of the loss, or taken off the reward (summed over the completion's tokens)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence from the sampled tokens."""
    kl_importance: bool = False
    """Multiply the estimate by the ratio, which makes k3's gradient that of the reverse KL (arXiv 2512.02556)."""
    importance_sampling_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "none"
    """Weigh tokens by trainer / sampler probability, truncated at the cap or left out beyond the bounds. vespo takes
    the tokens' weights into its own; dppo has no use for it, because its ratio is to the sampler already."""
    importance_sampling_cap: Above0 = 3.0
    """Upper bound of that weight."""
    importance_sampling_floor: AtLeast0 = 0.0
    """Lower bound of that weight, for the `_mask` forms."""
    off_policy_mask_threshold: Above0 | None = None
    """Leave out completions with advantage below 0 whose tokens have lost more than this in mean logprob since they
    were sampled (arXiv 2512.02556). Default: none is."""
    mask_truncated_completions: bool = False
    """Leave completions that a limit ended out of the loss: DAPO's overlong filtering. Their rewards still count in
    their group's mean."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Train on this fraction of the step's tokens, those of highest entropy (arXiv 2506.01939)."""
    entropy_coef: AtLeast0 = 0.0
    """Weight of an entropy bonus, per token and averaged as the loss is."""
    use: Name | None = None
    """A loss of your own in the place of the surrogate, `file.py:function`, `file.py` (of one function) or
    `package.module:function`: (current, batch, cfg) -> per_token_loss, each [B, T]; `batch` is a grpo.types.Batch."""

    @property
    def preset(self) -> presets.Preset:
        """The variant with what this recipe replaces of it."""
        preset = presets.PRESETS[self.type]
        symmetric = preset.epsilon == preset.epsilon_high
        bounds = {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high or (self.epsilon if symmetric else None)}
        axes = {"ratio": self.ratio, "surrogate": self.surrogate, "normalize": self.normalize}
        given: dict[str, Any] = {name: value for name, value in {**axes, **bounds}.items() if value is not None}
        return replace(preset, **given)

    @property
    def corrects_samplers(self) -> bool:
        """Whether the loss counts with a sampler that is not the policy."""
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
                "loss.importance_sampling_correction: dppo's ratio is to the sampler already; leave it out"
            )
        if self.use is None and surrogate == "vespo" and form.startswith("sequence"):
            raise ValueError(
                f"loss.importance_sampling_correction: vespo multiplies the weights of a completion's tokens; {form} "
                "has one for all of them. Take token_truncate or token_mask"
            )
        if self.beta_end == self.beta:
            raise ValueError("loss.beta_end does nothing: it is beta")
        if self.importance_sampling_floor >= self.importance_sampling_cap:
            raise ValueError(
                "loss.importance_sampling_floor is not below importance_sampling_cap: nothing would be left"
            )
        if self.delta is not None and self.delta <= 1 + self.preset.epsilon_high:
            raise ValueError("loss.delta is not above 1 + epsilon_high: it would clip what the upper bound allows")
        if self.use is not None and (
            unread := self.changed & {"ratio", "surrogate", *presets.READ_BY} - {"epsilon", "epsilon_high"}
        ):
            raise ValueError(f"loss.{min(unread)} does nothing beside loss.use")
        if self.kl_in == "reward" and self.kl_importance:
            raise ValueError("loss.kl_importance does nothing with kl_in: reward")
        for name in self.changed & set(presets.READ_BY):
            if surrogate not in presets.READ_BY[name]:
                known = ", ".join(presets.READ_BY[name])
                raise ValueError(
                    f"loss.{name} does nothing with the {surrogate} surrogate of {self.type}, only with {known}"
                )
        if self.preset.ratio != "token" and surrogate not in ("clip", "cispo", "sapo"):
            raise ValueError(f"loss.ratio: the {surrogate} surrogate has a ratio of its own; leave it at token")
        return self
