"""What a policy learns from a teacher: the reverse KL divergence KL(policy ‖ teacher) at each token that it sampled.

Tokens come from the policy itself, and the gradient leaves out how a token changes the tokens after it: on-policy
distillation (GKD, arXiv 2306.13649; MiniLLM, arXiv 2306.08543, which has the reverse KL).
"""

from __future__ import annotations

import mlx.core as mx

from grpo.backend.maths import logsumexp

MOST = 1 - 1e-6
"""Of the probability of the teacher's likeliest tokens, what counts at most: the rest keeps a logarithm."""


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
    """The teacher's `k` likeliest of the first `vocabulary` tokens: their ids (int32) and logprobs, `[..., k]` each.

    teacher `[..., V]` float32 are logits at the sampling temperature. In no order; fewer if there are not so many.
    """
    logprobs = _log_softmax(teacher[..., :vocabulary])
    k = min(k, logprobs.shape[-1])
    ids = mx.argpartition(-logprobs, k - 1, axis=-1)[..., :k]
    return ids.astype(mx.int32), mx.take_along_axis(logprobs, ids, axis=-1)


def top_k_kl(logits: mx.array, ids: mx.array, teacher: mx.array) -> mx.array:
    """The reverse KL in nats over k tokens, and all others as one: `[..., V]` and twice `[..., k]` in, `[...]` out.

    logits float32 are the policy's at the sampling temperature. `ids` are those tokens and `teacher` their logprobs
    under the teacher. With q and p the probabilities under policy and teacher, and Q and P their sums over the k tokens:

        Σ_k q (log q - log p) + (1 - Q) (log (1 - Q) - log (1 - P))

    It is never negative, never above the exact KL, and the exact KL if no more than one token is left over. The
    gradient is `logits`'.
    """
    policy = mx.take_along_axis(logits, ids, axis=-1) - logsumexp(logits)[..., None]
    inside, theirs = (mx.minimum(mx.exp(logprobs).sum(axis=-1), MOST) for logprobs in (policy, teacher))
    rest = (1 - inside) * (mx.log1p(-inside) - mx.log1p(-theirs))
    return (mx.exp(policy) * (policy - teacher)).sum(axis=-1) + rest


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - logsumexp(logits)[..., None]
