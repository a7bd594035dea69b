"""What a policy learns from a teacher: the reverse KL divergence KL(policy ‖ teacher) at each token that it sampled.

Tokens come from the policy itself, and the gradient leaves out how a token changes the tokens after it: on-policy
distillation (GKD, arXiv 2306.13649; MiniLLM, arXiv 2306.08543, which has the reverse KL).
"""

from __future__ import annotations

import mlx.core as mx

from grpo.backend.maths import logsumexp

NEVER = -1e30
"""The logit of what is left out of a sum of exponentials."""


def teacher_advantages(advantages: mx.array, behaviour: mx.array, teacher: mx.array, coef: float) -> mx.array:
    """Advantages with those from a teacher: `[B, T]` float32 each.

        A + coef · (log p_teacher - log p_policy)

    of the sampled token, with `behaviour` for log p_policy: minus the reverse KL as one sample estimates it (k1). Times
    ∇ log p_policy its mean over samples is minus the gradient of the exact KL. Source: Thinking Machines, "On-Policy
    Distillation" (2025), and prime-rl's `opd`.
    """
    return advantages + coef * (teacher - behaviour)


def sampled_kl(behaviour: mx.array, teacher: mx.array) -> mx.array:
    """The reverse KL in nats as the sampled token estimates it: unbiased, and of either sign. `[B, T]` float32."""
    return behaviour - teacher


def exact_kl(logits: mx.array, teacher: mx.array) -> mx.array:
    """The reverse KL in nats over the vocabulary, Σ p (log p - log p_teacher): two `[..., V]` float32 in, `[...]` out.

    Both are logits at the sampling temperature. Where one has more tokens than the other (models of one family pad
    their vocabularies to different sizes), both are of the tokens that both have. The gradient is `logits`'.
    """
    common = min(logits.shape[-1], teacher.shape[-1])
    policy, teacher = _log_softmax(logits[..., :common]), mx.stop_gradient(_log_softmax(teacher[..., :common]))
    return (mx.exp(policy) * (policy - teacher)).sum(axis=-1)


def likeliest(teacher: mx.array, k: int, vocabulary: int) -> tuple[mx.array, mx.array]:
    """The teacher's `k` likeliest of the first `vocabulary` tokens, and all others as one.

    teacher `[..., V]` float32 are logits at the sampling temperature. Returns the tokens' ids, `[..., k]` int32, in no
    order, and their logprobs with that of the others behind them, `[..., k + 1]` float32. At least one is left over.
    """
    logits = teacher[..., :vocabulary]
    k = min(k, logits.shape[-1] - 1)
    ids = mx.argpartition(-logits, k - 1, axis=-1)[..., :k].astype(mx.int32)
    return ids, _with_others(logits, ids)


def top_k_kl(logits: mx.array, ids: mx.array, teacher: mx.array) -> mx.array:
    """The reverse KL in nats over k tokens, and all others as one.

    logits `[..., V]` float32 are the policy's at the sampling temperature. `ids` `[..., k]` and
    `teacher` `[..., k + 1]` are what `likeliest` gives. Returns `[...]`. With q and p the probabilities under policy
    and teacher, and Q and P their sums over the k tokens:

        Σ_k q (log q - log p) + (1 - Q) (log (1 - Q) - log (1 - P))

    It is never negative, never above the exact KL, and the exact KL if one token alone is left over. The gradient is
    `logits`'.
    """
    policy = _with_others(logits, ids)
    return (mx.exp(policy) * (policy - mx.stop_gradient(teacher))).sum(axis=-1)


def _with_others(logits: mx.array, ids: mx.array) -> mx.array:
    """The logprobs of these tokens, and behind them that of all others together: `[..., k + 1]`.

    The others are summed: 1 - Q would lose the digits of a probability near 0.
    """
    others = mx.put_along_axis(logits, ids, mx.array(NEVER), axis=-1)
    found = mx.concatenate([mx.take_along_axis(logits, ids, axis=-1), logsumexp(others)[..., None]], axis=-1)
    return found - logsumexp(logits)[..., None]


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - logsumexp(logits)[..., None]
