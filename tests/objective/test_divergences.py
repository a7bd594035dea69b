"""Divergences from a teacher against float64, numbers by hand, and against each other."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from objective.columns import of_columns

from grpo.config import LossConfig
from grpo.objective import policy_loss
from grpo.objective.teaching import exact_kl, likeliest, sampled_kl, teacher_advantages, top_k_kl

DRAW = np.random.default_rng(0)
POLICY, TEACHER = DRAW.normal(0, 2, (3, 4, 11)), DRAW.normal(0, 2, (3, 4, 11))


def array(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def oracle(policy: np.ndarray, teacher: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL(policy ‖ teacher) in float64, and its gradient with respect to the policy's logits, p (log p - log t - KL)."""
    p, t = softmax(policy), softmax(teacher)
    kl = (p * np.log(p / t)).sum(axis=-1)
    return kl, p * (np.log(p / t) - kl[..., None])


def merged(p: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Probabilities of the k tokens, and of all others as one."""
    inside = np.take_along_axis(p, ids, axis=-1)
    return np.concatenate([inside, 1 - inside.sum(axis=-1, keepdims=True)], axis=-1)


def with_gradient(function, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values, and the gradient of their sum."""
    value, gradient = function(array(logits)), mx.grad(lambda x: function(x).sum())(array(logits))
    return np.array(value), np.array(gradient)


def test_by_hand() -> None:
    """Policy (1/2, 1/2), teacher (3/4, 1/4): ½ ln(2/3) + ½ ln 2 = ½ ln(4/3)."""
    policy, teacher = mx.log(mx.array([[0.5, 0.5]])), mx.log(mx.array([[0.75, 0.25]]))
    assert exact_kl(policy, teacher).item() == pytest.approx(0.5 * np.log(4 / 3), abs=1e-6)
    ids, logprobs = likeliest(teacher, 1, 2)
    assert ids.tolist() == [[0]]
    assert np.exp(np.array(logprobs)).tolist() == [pytest.approx([0.75, 0.25], abs=1e-6)]
    assert top_k_kl(policy, ids, logprobs).item() == pytest.approx(0.5 * np.log(4 / 3), abs=1e-6)  # one is left over
    # Four tokens: (.4, .3, .2, .1) and (.1, .2, .3, .4). The teacher's likeliest is the last, and .9 and .6 are others.
    policy, teacher = mx.log(mx.array([0.4, 0.3, 0.2, 0.1])), mx.log(mx.array([0.1, 0.2, 0.3, 0.4]))
    found = top_k_kl(policy, *likeliest(teacher, 1, 4)).item()
    assert found == pytest.approx(0.1 * np.log(0.1 / 0.4) + 0.9 * np.log(0.9 / 0.6), abs=1e-6)


def test_the_sampled_form_by_hand() -> None:
    advantages = teacher_advantages(mx.array([[1.0, 0.0]]), mx.array([[-1.0, -3.0]]), mx.array([[-2.0, -0.5]]), 0.5)
    assert advantages.tolist() == [[0.5, 1.25]]  # 1 + ½ (-2 + 1); 0 + ½ (-0.5 + 3)
    assert sampled_kl(mx.array([-1.0]), mx.array([-2.0])).tolist() == [1.0]


def test_the_exact_kl_and_its_gradient() -> None:
    value, gradient = with_gradient(lambda logits: exact_kl(logits, array(TEACHER)), POLICY)
    expected, slope = oracle(POLICY, TEACHER)
    np.testing.assert_allclose(value, expected, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 10, 11, 64])
def test_the_top_k_kl_and_its_gradient(k: int) -> None:
    """Against float64: with the merged probabilities m of the policy and s of the teacher, the gradient with respect to
    a token's logit is p (log m - log s - KL), m and s being what the token is merged into."""
    ids, logprobs = likeliest(array(TEACHER), k, 11)
    assert ids.shape[-1] == min(k, 10)
    value, gradient = with_gradient(lambda logits: top_k_kl(logits, ids, logprobs), POLICY)
    exact, slope = oracle(POLICY, TEACHER)
    if k >= 10:
        np.testing.assert_allclose(value, exact, atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(gradient, slope, atol=1e-6)
        return
    picked = np.array(ids)
    order = np.argsort(-TEACHER, axis=-1)[..., :k]
    assert (np.sort(picked, axis=-1) == np.sort(order, axis=-1)).all()
    p, m, s = softmax(POLICY), merged(softmax(POLICY), picked), merged(softmax(TEACHER), picked)
    kl = (m * np.log(m / s)).sum(axis=-1)
    np.testing.assert_allclose(value, kl, atol=1e-6, rtol=1e-6)
    assert (value >= 0).all()
    assert (value <= exact).all()
    logs = np.broadcast_to(np.log(m / s)[..., -1:], p.shape).copy()
    np.put_along_axis(logs, picked, np.log(m / s)[..., :-1], axis=-1)
    np.testing.assert_allclose(gradient, p * (logs - kl[..., None]), atol=1e-6)


def test_a_teacher_of_another_width_counts_with_the_tokens_that_both_have() -> None:
    padded = np.concatenate([TEACHER, np.full((3, 4, 5), 3.0)], axis=-1)
    expected, slope = oracle(POLICY, TEACHER)
    np.testing.assert_allclose(np.array(exact_kl(array(POLICY), array(padded))), expected, atol=1e-6, rtol=1e-6)
    wider = np.concatenate([POLICY, np.full((3, 4, 5), 3.0)], axis=-1)
    value, gradient = with_gradient(lambda logits: exact_kl(logits, array(TEACHER)), wider)
    np.testing.assert_allclose(value, expected, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(gradient[..., :11], slope, atol=1e-6)
    assert not gradient[..., 11:].any()
    ids, logprobs = likeliest(array(padded), 3, 11)
    assert np.array(ids).max() < 11
    np.testing.assert_allclose(np.exp(np.array(logprobs)), merged(softmax(TEACHER), np.array(ids)), atol=1e-6)


def test_the_mean_of_the_sampled_form_is_the_exact_gradient() -> None:
    """Over all tokens, each with the policy's probability: Σ_v p_v · A_v ∇ log p_v = -∇ KL, in the loss -A r."""
    p, (kl, slope) = softmax(POLICY), oracle(POLICY, TEACHER)
    log_p, log_t = np.log(p), np.log(softmax(TEACHER))
    rows = p.reshape(-1, 11)
    advantages = teacher_advantages(
        mx.zeros(rows.shape), array(log_p.reshape(-1, 11)), array(log_t.reshape(-1, 11)), 1.0
    )
    batch = of_columns(mx.ones(rows.shape), array(rows), advantages, anchor=array(log_p.reshape(-1, 11)))
    gradient = mx.grad(
        lambda logits: policy_loss(logits - mx.logsumexp(logits, -1, keepdims=True), batch, LossConfig())[0]
    )
    np.testing.assert_allclose(np.array(gradient(array(POLICY.reshape(-1, 11)))), slope.reshape(-1, 11), atol=2e-6)
    estimate = (p * np.array(sampled_kl(array(log_p), array(log_t)))).sum(axis=-1)
    np.testing.assert_allclose(estimate, kl, atol=1e-5)


TRAINED = np.array([[1, 1, 0, 1], [1, 0, 0, 0]], np.float32)


def test_the_loss_has_the_divergence_of_trained_tokens_times_weight_and_coefficient() -> None:
    """Beside a surrogate at ratio 1, whose gradient is -A, and with rubbish at untrained tokens."""
    weights, coef = TRAINED / 4, 0.5
    divergence = np.where(TRAINED > 0, np.arange(8).reshape(2, 4), np.nan)
    batch = of_columns(array(TRAINED), array(weights), [2.0, -1.0], teacher_coef=mx.array(coef))
    loss = lambda lp, kl: policy_loss(lp, batch, LossConfig(), divergence=kl)  # noqa: E731
    value, metrics = loss(mx.zeros((2, 4)) - 1, array(divergence))
    kl = 0 + 1 + 3 + 4
    assert value.item() == pytest.approx((-2.0 * 3 + 1.0 + coef * kl) / 4, abs=1e-6)
    assert metrics["teacher/kl"].item() == pytest.approx(kl / 4, abs=1e-6)
    gradient = mx.grad(lambda kl: loss(mx.zeros((2, 4)) - 1, kl)[0])(array(divergence))
    np.testing.assert_allclose(np.array(gradient), weights * coef, atol=1e-7)


def test_a_custom_loss_and_a_mask_leave_the_teacher_in() -> None:
    batch = of_columns(array(TRAINED), array(TRAINED), [1.0, 1.0], teacher_coef=mx.array(2.0))
    nothing = lambda current, batch, cfg: mx.zeros(current.shape)  # noqa: E731
    value, _ = policy_loss(mx.zeros((2, 4)) - 1, batch, LossConfig(), custom=nothing, divergence=mx.ones((2, 4)))
    assert value.item() == 8


def test_a_weight_without_a_divergence_is_refused() -> None:
    batch = of_columns(array(TRAINED), array(TRAINED), [1.0, 1.0], teacher_coef=mx.array(2.0))
    with pytest.raises(ValueError, match="needs the argument `divergence`"):
        policy_loss(mx.zeros((2, 4)) - 1, batch, LossConfig())


def test_the_sampled_form_is_measured_over_trained_tokens() -> None:
    behaviour, teacher = np.where(TRAINED > 0, -1.0, np.nan), np.array([[-2.0, -4, np.nan, -1], [-1.5, 0, 0, 0]])
    columns = {"behaviour": array(behaviour), "teacher": array(teacher)}
    _, metrics = policy_loss(
        mx.zeros((2, 4)) - 1, of_columns(array(TRAINED), array(TRAINED), [0, 0], **columns), LossConfig()
    )
    assert metrics["teacher/kl"].item() == pytest.approx((1 + 3 + 0 + 0.5) / 4, abs=1e-6)
