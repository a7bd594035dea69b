"""Published variants of GRPO, each a point on three axes, under the names of papers and TRL.

Loss = ratio × surrogate × normalizer. For a completion, lp are the current logprobs of its tokens, anchor the anchor's
logprobs (the policy before the step's first update; for a group that `rollout.reuse` replays, the policy that sampled
it), A is its advantage, and m the mask over its trained tokens:

    ratio       token            r = exp(lp - anchor)
                sequence         s = exp(Σ m (lp - anchor) / Σ m), one ratio for the whole completion
                sequence_token   the value of s, with each token's own gradient: sg(s) · exp(lp - sg(lp))
    surrogate   clip             -min(r A, clip(r, 1 - ε, 1 + ε_high) A); with δ the first r is min(r, δ)
                cispo            -sg(min(r, ε_max)) A lp
                sapo             -(4/τ) σ(τ (r - 1)) A, τ by the sign of A
                vespo            -sg(φ) A lp, φ = exp(λ + k ln W - λ W), k and λ by the sign of A,
                                 ln W = Σ m (lp - anchor), and with importance_sampling_correction + Σ m ln w
                gmpo             -A exp(Σ m c / Σ m), c = min(lp - anchor, ε_high) for A > 0, max(lp - anchor, -ε)
                                 else
                dppo             -sg(min(r, 20)) A lp + c ln² r, r = exp(lp - sampler's), without the first term for
                                 tokens beyond the bounds: A > 0 and exp(lp) - exp(sampler's) > ε_high, or A <= 0 and
                                 exp(lp) - exp(sampler's) < -ε; c is 0 in the paper, 1e-3 in prime-rl
                reinforce        -A lp
    normalize   sequence         mean over completions of the mean over their tokens
                sequence_sum     mean over completions of the sum over their tokens
                token            sum over the step's tokens, divided by their number
                constant         sum over the step's tokens, divided by completions × max_completion_length
                micro_batch      mean over micro-batches of the mean over their tokens: depends on the split

The settings below come from the papers; a recipe can replace each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Ratio = Literal["token", "sequence", "sequence_token"]
Surrogate = Literal["clip", "cispo", "sapo", "vespo", "gmpo", "dppo", "reinforce"]
Normalize = Literal["sequence", "sequence_sum", "token", "constant", "micro_batch"]
Scale = Literal["group", "batch", "none"]
Baseline = Literal["group", "leave_one_out", "batch", "gdpo", "maxrl"]
PresetName = Literal[
    "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "gspo_token", "cispo", "sapo", "luspo", "vespo", "gmpo", "dppo",
    "reinforce++", "rloo",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Preset:
    """A variant: its source, its three axes, the baseline and scaling of its advantages, and its bounds."""

    source: str
    ratio: Ratio = "token"
    surrogate: Surrogate = "clip"
    normalize: Normalize = "sequence"
    baseline: Baseline = "group"
    scale_rewards: Scale = "group"
    epsilon: float = 0.2
    epsilon_high: float = 0.2

    @property
    def shares_gradient(self) -> bool:
        """Whether all tokens of a completion share one gradient through a single ratio, even if their advantages
        differ."""
        return self.surrogate == "gmpo" or (self.ratio == "sequence" and self.surrogate in ("clip", "sapo"))


PRESETS: dict[PresetName, Preset] = {
    "grpo": Preset("DeepSeekMath, arXiv 2402.03300; DeepSeek-R1: beta 0.001, 16 completions a prompt"),
    "bnpo": Preset("arXiv 2506.02864, in the form of TRL: averages over the tokens that go through together",
                   normalize="micro_batch"),
    "dr_grpo": Preset("Dr. GRPO, arXiv 2503.20783: 8 completions a prompt, beta 0",
                      normalize="constant", scale_rewards="none"),
    "dapo": Preset("DAPO, arXiv 2503.14476: clip-higher, token-level loss; 16 completions a prompt",
                   normalize="token", epsilon_high=0.28),
    "gspo": Preset("GSPO, arXiv 2507.18071: 4 minibatches", ratio="sequence", epsilon=3e-4, epsilon_high=4e-4),
    "gspo_token": Preset("GSPO-token, arXiv 2507.18071, eq. 14", ratio="sequence_token",
                         epsilon=3e-4, epsilon_high=4e-4),
    "cispo": Preset("CISPO of MiniMax-M1, arXiv 2506.13585; ceiling of ScaleRL, arXiv 2510.13786",
                    surrogate="cispo", normalize="token"),
    "sapo": Preset("SAPO, arXiv 2511.20347", surrogate="sapo"),
    "luspo": Preset("LUSPO, arXiv 2602.05261: GSPO without its length bias", ratio="sequence", normalize="sequence_sum",
                    epsilon=2e-3, epsilon_high=2.5e-3),
    "vespo": Preset("VESPO, arXiv 2602.10693", surrogate="vespo", normalize="token"),
    "gmpo": Preset("GMPO, arXiv 2507.20673: bounds on the log-ratio, geometric mean over tokens",
                   surrogate="gmpo", epsilon=0.4, epsilon_high=0.4),
    "dppo": Preset("DPPO-Binary-TV, arXiv 2602.04879: bounds on the difference of probabilities to the sampler's",
                   surrogate="dppo", normalize="token", epsilon=0.15, epsilon_high=0.15),
    "reinforce++": Preset("REINFORCE++, arXiv 2501.03262", surrogate="reinforce", normalize="token", baseline="batch"),
    "rloo": Preset("RLOO, arXiv 2402.14740", surrogate="reinforce", normalize="token",
                   baseline="leave_one_out", scale_rewards="none"),
}  # fmt: skip

READ_BY: dict[str, tuple[Surrogate, ...]] = {
    "epsilon": ("clip", "gmpo", "dppo"),
    "epsilon_high": ("clip", "gmpo", "dppo"),
    "delta": ("clip",),
    "epsilon_max": ("cispo",),
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
    "vespo_k_pos": ("vespo",),
    "vespo_lambda_pos": ("vespo",),
    "vespo_k_neg": ("vespo",),
    "vespo_lambda_neg": ("vespo",),
    "dppo_penalty": ("dppo",),
}
"""The surrogates that use a setting. With any other surrogate, the setting is refused."""
