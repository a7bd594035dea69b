"""On-policy distillation: the reverse KL divergence KL(policy ‖ teacher) at each token that the policy sampled.

The gradient leaves out how a token changes the tokens after it. Sources: GKD (arXiv 2306.13649); MiniLLM (arXiv
2306.08543) for the reverse KL.
"""

from __future__ import annotations

import mlx.core as mx

from grpo.backend.maths import logsumexp

NEVER = -1e30
"""The logit of tokens that are left out of a sum of exponentials."""


def teacher_advantages(advantages: mx.array, behaviour: mx.array, teacher: mx.array, coef: float) -> mx.array:
    """Advantages plus the teacher's part: all arrays are `[B, T]` float32.

        A + coef · (log p_teacher - log p_policy)

    of the sampled token, with `behaviour` as log p_policy. The difference is minus the one-sample estimate (k1) of the
    reverse KL. Multiplied by ∇ log p_policy, its expectation is minus the gradient of the exact KL. Sources: Thinking
    Machines, "On-Policy Distillation" (2025), and prime-rl's `opd`.
    """
    return advantages + coef * (teacher - behaviour)


def sampled_kl(behaviour: mx.array, teacher: mx.array) -> mx.array:
    """The reverse KL in nats, estimated from the sampled token: unbiased, of either sign. `[B, T]` float32."""
    return behaviour - teacher


def exact_kl(logits: mx.array, teacher: mx.array) -> mx.array:
    """The reverse KL in nats over the vocabulary, Σ p (log p - log p_teacher): two `[..., V]` float32 in, `[...]` out.

    Both are logits at the sampling temperature. Models of one family may pad their vocabularies to different sizes:
    only the tokens that both models have are compared. Only `logits` gets a gradient.
    """
    common = min(logits.shape[-1], teacher.shape[-1])
    policy, teacher = _log_softmax(logits[..., :common]), mx.stop_gradient(_log_softmax(teacher[..., :common]))
    return (mx.exp(policy) * (policy - teacher)).sum(axis=-1)


def likeliest(teacher: mx.array, k: int, vocabulary: int) -> tuple[mx.array, mx.array]:
    """The teacher's `k` likeliest of the first `vocabulary` tokens, and all other tokens as one.

    teacher `[..., V]` float32 are logits at the sampling temperature. Returns the ids of the tokens, `[..., k]` int32,
    in no order; and their logprobs followed by the logprob of all others together, `[..., k + 1]` float32. k is capped
    so that at least one token is left for the others.
    """
    logits = teacher[..., :vocabulary]
    k = min(k, logits.shape[-1] - 1)
    ids = mx.argpartition(-logits, k - 1, axis=-1)[..., :k].astype(mx.int32)
    return ids, _with_others(logits, ids)


def top_k_kl(logits: mx.array, ids: mx.array, teacher: mx.array) -> mx.array:
    """The reverse KL in nats over k tokens, with all other tokens counted as one.

    logits `[..., V]` float32 are the policy's at the sampling temperature. `ids` `[..., k]` and `teacher`
    `[..., k + 1]` come from `likeliest`. Returns `[...]`. With q and p the probabilities under policy and teacher, and
    Q and P their sums over the k tokens:

        Σ_k q (log q - log p) + (1 - Q) (log (1 - Q) - log (1 - P))

    It is never negative and never above the exact KL, and equals the exact KL if only one token is not among the k.
    Only `logits` gets a gradient.
    """
    policy = _with_others(logits, ids)
    return (mx.exp(policy) * (policy - mx.stop_gradient(teacher))).sum(axis=-1)


def _with_others(logits: mx.array, ids: mx.array) -> mx.array:
    """The logprobs of these tokens, followed by the logprob of all others together: `[..., k + 1]`.

    The others are summed, because 1 - Q would lose the digits of a probability near 0.
    """
    others = mx.put_along_axis(logits, ids, mx.array(NEVER), axis=-1)
    found = mx.concatenate([mx.take_along_axis(logits, ids, axis=-1), logsumexp(others)[..., None]], axis=-1)
    return found - logsumexp(logits)[..., None]


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - logsumexp(logits)[..., None]
