"""The objective by hand-computed numbers."""

import math

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objective.columns import of_columns, rows_of

from grpo.config import AdvantageConfig, LossConfig
from grpo.objective import advantages, combine_metrics, policy_loss, token_weights, total_rewards
from grpo.objective.kl import kl_estimate
from grpo.objective.masks import soft_overlong_punishment, top_entropy_mask
from grpo.presets import PRESETS
from grpo.types import Batch, Totals

NAN = math.nan
LENGTHS = [1, 3, 2, 4]
ADVANTAGES = [0.5, -1.5, 0.25, 0.75]


def column(rewards: list[float], size: int, scale: str) -> list[float]:
    matrix = mx.array([[reward] for reward in rewards])
    return advantages(matrix, mx.array([1.0]), size, AdvantageConfig(scale_rewards=scale)).tolist()


def mask_of(lengths: list[int], width: int | None = None) -> mx.array:
    return (mx.arange(width or max(lengths))[None] < mx.array(lengths)[:, None]).astype(mx.float32)


def weights_of(mask: mx.array, cfg: LossConfig, longest: int = 8) -> mx.array:
    return token_weights(mask, Totals(len(mask), int(mask.sum().item())), cfg, longest)


def batch_of(cfg: LossConfig, mask: mx.array, advantage: list[float], **columns) -> Batch:
    return of_columns(mask, weights_of(mask, cfg), advantage, **columns)


def test_group_advantages() -> None:
    assert column([1, 0, 1, 1], 4, "group") == pytest.approx([0.4999, -1.4997, 0.4999, 0.4999], abs=1e-4)
    assert column([1, 0, 1, 1], 4, "none") == pytest.approx([0.25, -0.75, 0.25, 0.25], abs=1e-6)


def test_batch_scaling_divides_by_the_deviation_over_all_groups() -> None:
    # Rewards 1, 0, 0, 0: deviation 0.5 over the batch, with Bessel's correction.
    assert column([1, 0, 0, 0], 2, "batch") == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001, 0, 0], abs=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6, -7.7])
def test_a_uniform_group_gives_exactly_zero(scale: str, value: float) -> None:
    assert column([value] * 7 + [1, 0, 1, 0, 1, 0, 1], 7, scale)[:7] == [0.0] * 7


def test_a_completion_that_nothing_scored_leaves_the_baseline() -> None:
    got = column([1, NAN, 0, NAN], 4, "none")
    assert got == pytest.approx([0.5, 0, -0.5, 0])
    assert column([1, NAN, 0, NAN], 4, "group") == pytest.approx(
        [0.5 / (math.sqrt(0.5) + 1e-4), 0, -0.5 / (math.sqrt(0.5) + 1e-4), 0], abs=1e-6
    )
    assert column([NAN, NAN, 3, NAN], 4, "group") == [0.0] * 4


def test_rewards_are_weighted_and_none_is_not_zero() -> None:
    rewards = mx.array([[1.0, 2.0, 9.0], [NAN, 2.0, 9.0], [NAN, NAN, 9.0]])
    total = total_rewards(rewards, mx.array([1.0, 0.5, 0.0])).tolist()
    assert total[:2] == [2.0, 1.0]
    assert math.isnan(total[2])  # a reward of weight 0 is a metric, and scores nothing


def test_weights_by_hand() -> None:
    mask = mask_of([1, 3])
    assert weights_of(mask, LossConfig(type="grpo")).tolist() == [
        [0.5, 0, 0],
        pytest.approx([1 / 6, 1 / 6, 1 / 6]),
    ]
    assert weights_of(mask, LossConfig(type="dapo")).tolist() == [[0.25, 0, 0], [0.25, 0.25, 0.25]]
    assert weights_of(mask, LossConfig(type="dr_grpo")).tolist() == [[1 / 16, 0, 0], [1 / 16, 1 / 16, 1 / 16]]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("grpo", -sum(ADVANTAGES) / 4),
        ("dapo", -sum(a * n for a, n in zip(ADVANTAGES, LENGTHS, strict=True)) / 10),
        ("dr_grpo", -sum(a * n for a, n in zip(ADVANTAGES, LENGTHS, strict=True)) / (4 * 8)),
    ],
)
def test_at_ratio_one_the_loss_is_the_mean_advantage(kind: str, expected: float) -> None:
    cfg = LossConfig(type=kind)
    logprobs = mx.random.normal((4, 4)) - 3
    loss, metrics = policy_loss(logprobs, batch_of(cfg, mask_of(LENGTHS), ADVANTAGES), cfg)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert metrics["clip_ratio/region_mean"].item() == 0


def one_token(ratio: float, advantage: float, cfg: LossConfig) -> tuple[float, float, dict]:
    """Loss, its gradient with respect to the logprob, and metrics, of a single token of weight 1."""
    batch = batch_of(LossConfig(type="dapo"), mx.array([[1.0]]), [advantage], anchor=mx.array([[-2.0]]))
    current = mx.array([[-2.0 + math.log(ratio)]])
    loss, metrics = policy_loss(current, batch, cfg)
    gradient = mx.grad(lambda logprobs: policy_loss(logprobs, batch, cfg)[0])(current)
    return loss.item(), gradient.item(), {name: value.item() for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "low", "high"),
    [
        (1.5, 1.0, -1.28, 0.0, 0, 1),  # clipped above
        (1.25, 1.0, -1.25, -1.25, 0, 0),  # inside the higher bound
        (1.5, -1.0, 1.5, 1.5, 0, 0),  # the bound does not bind: the ratio may be brought back
        (0.5, -1.0, 0.8, 0.0, 1, 0),  # clipped below
        (0.5, 1.0, -0.5, -0.5, 0, 0),
        (1.0, 2.0, -2.0, -2.0, 0, 0),
    ],
)
def test_clipping(ratio: float, advantage: float, loss: float, gradient: float, low: int, high: int) -> None:
    got_loss, got_gradient, metrics = one_token(ratio, advantage, LossConfig(epsilon=0.2, epsilon_high=0.28))
    assert got_loss == pytest.approx(loss, abs=1e-5)
    assert got_gradient == pytest.approx(gradient, abs=1e-5)
    assert (metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) == (low, high)
    assert metrics["clip_ratio/region_mean"] == low + high


def test_epsilon_high_is_epsilon_unless_given() -> None:
    assert one_token(1.5, 1.0, LossConfig(type="grpo", epsilon=0.1))[0] == pytest.approx(-1.1, abs=1e-5)


def test_k3_and_its_gradient() -> None:
    current, reference = mx.array([-1.0, -2.0]), mx.array([-1.5, -2.0])
    expected = [math.exp(-0.5) + 0.5 - 1, 0.0]
    assert kl_estimate(current, reference, "k3").tolist() == pytest.approx(expected, abs=1e-6)
    gradient = mx.grad(lambda x: kl_estimate(x, reference, "k3").sum())(current)
    assert gradient.tolist() == pytest.approx([1 - math.exp(-0.5), 0.0], abs=1e-6)


def test_on_policy_gradients_of_dapo_and_cispo_agree() -> None:
    mask, logprobs = mask_of(LENGTHS), mx.random.normal((4, 4), key=mx.random.key(3)) - 2
    found = []
    for kind in ("dapo", "cispo", "rloo", "reinforce++"):
        cfg = LossConfig(type=kind)
        batch = batch_of(cfg, mask, ADVANTAGES)
        found.append(mx.grad(lambda x, batch=batch, cfg=cfg: policy_loss(x, batch, cfg)[0])(logprobs))
    assert all(mx.allclose(found[0], other, atol=1e-7) for other in found[1:])
    expected = -mx.array(ADVANTAGES)[:, None] * mask / 10
    assert mx.allclose(found[0], expected, atol=1e-7)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_at_initialisation_the_penalty_and_its_gradient_are_zero(estimator: str) -> None:
    logprobs = mx.random.normal((2, 3)) - 2
    assert (kl_estimate(logprobs, logprobs, estimator) == 0).all().item()
    assert (mx.grad(lambda x: kl_estimate(x, mx.stop_gradient(logprobs), estimator).sum())(logprobs) == 0).all().item()


def test_at_ratio_one_sapo_is_twice_the_advantage_over_tau() -> None:
    cfg = LossConfig(type="sapo")
    loss, _ = policy_loss(mx.zeros((4, 4)) - 1, batch_of(cfg, mask_of(LENGTHS), ADVANTAGES), cfg)
    expected = -sum(2 * a / (1.0 if a > 0 else 1.05) for a in ADVANTAGES) / 4
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("length", [(80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (140, -1.0), (1, 0.0)])
def test_soft_overlong_punishment(length: tuple[int, float]) -> None:
    assert soft_overlong_punishment(length[0], 100, 20) == pytest.approx(length[1])


def test_top_entropy_mask() -> None:
    mask = mask_of([6, 4, 0], 6)
    entropies = mx.arange(18).reshape(3, 6).astype(mx.float32) * mx.where(mask > 0, 1, 100)
    kept = top_entropy_mask(entropies, mask, 0.2)
    assert kept.sum().item() == 2  # of ten
    assert kept[1].tolist() == [0, 0, 1, 1, 0, 0]
    assert mx.array_equal(top_entropy_mask(entropies, mask, 1.0), mask)
    assert top_entropy_mask(entropies, mask, 0.001).sum().item() == 1
    assert top_entropy_mask(entropies, 0 * mask, 0.2).sum().item() == 0


def test_metrics_of_parts_are_those_of_the_whole() -> None:
    cfg = LossConfig(type="dapo", beta=0.1, delta=1.4)
    mask = mask_of(LENGTHS)
    key = mx.random.split(mx.random.key(5), 4)
    near = [mx.random.normal((4, 4), key=k) * 0.4 - 2 for k in key]
    fields = {"anchor": near[1], "reference": near[2], "behaviour": near[3]}
    whole = batch_of(cfg, mask, ADVANTAGES, **fields)
    _, expected = policy_loss(near[0], whole, cfg, mx.abs(near[3]))
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        _, metrics = policy_loss(near[0][rows], rows_of(whole, rows), cfg, mx.abs(near[3])[rows])
        parts.append({name: value.item() for name, value in metrics.items()})
    combined = combine_metrics(parts)
    assert set(combined) == set(expected)
    for name, value in expected.items():
        assert combined[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_sampling_metrics_by_hand() -> None:
    cfg = LossConfig()
    batch = batch_of(cfg, mask_of([2, 1]), [1.0, 1.0], behaviour=mx.array([[-1.0, -3.0], [-1.0, 7.0]]))
    _, metrics = policy_loss(mx.array([[-1.0, -2.0], [-3.0, 7.0]]), batch, cfg)
    got = {name.removeprefix("sampling/"): value.item() for name, value in metrics.items() if "sampling/" in name}
    ratios = [1.0, math.e, math.exp(-2)]
    assert got["sampling_logp_difference/mean"] == pytest.approx(1.0)
    assert got["sampling_logp_difference/max"] == pytest.approx(2.0)
    assert got["importance_sampling_ratio/min"] == pytest.approx(min(ratios))
    assert got["importance_sampling_ratio/mean"] == pytest.approx(sum(ratios) / 3)
    assert got["importance_sampling_ratio/max"] == pytest.approx(math.e)
    assert got["sequence_importance_sampling_ratio/max"] == pytest.approx(math.e)
    assert got["effective_sample_size"] == pytest.approx(sum(ratios) ** 2 / (3 * sum(r * r for r in ratios)), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"type": "sapo", "epsilon": 0.1}, "loss.epsilon does nothing with the sapo surrogate"),
        ({"epsilon_max": 2.0}, "loss.epsilon_max does nothing with the clip surrogate of dapo, only with cispo"),
        ({"type": "rloo", "delta": 2.0}, "loss.delta does nothing"),
        ({"kl_importance": True}, "loss.kl_importance does nothing while loss.beta is 0"),
        ({"type": "vespo", "ratio": "sequence"}, "has its own ratio"),
        ({"type": "dppo", "importance_sampling_correction": "token_mask"}, "ratio is to the sampler already"),
        ({"type": "vespo", "importance_sampling_correction": "sequence_mask"}, "Use token_truncate or token_mask"),
        ({"importance_sampling_cap": 2.0}, "loss.importance_sampling_cap does nothing"),
        ({"importance_sampling_correction": "token_truncate", "importance_sampling_floor": 0.5}, "floor does nothing"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LossConfig(**settings)


def test_presets_bring_their_papers_bounds_and_give_way_to_the_recipe() -> None:
    assert (LossConfig(type="dapo").preset.epsilon, LossConfig(type="dapo").preset.epsilon_high) == (0.2, 0.28)
    assert LossConfig(type="dapo", epsilon=0.1).preset.epsilon_high == 0.28  # what is not named stays
    assert LossConfig(type="grpo", epsilon=0.1).preset.epsilon_high == 0.1
    assert LossConfig(type="gspo").preset.ratio == "sequence"
    assert LossConfig(type="gspo", ratio="token", normalize="token").preset.normalize == "token"


def test_the_penalty_is_beta_times_k3_under_the_same_weights() -> None:
    cfg = LossConfig(type="dapo", beta=0.3)
    mask, current, reference = (
        mask_of([2, 1]),
        mx.array([[-1.0, -2.0], [-0.5, 0.0]]),
        mx.array([[-1.5, -1.0], [-0.5, 9.0]]),
    )
    loss, metrics = policy_loss(current, batch_of(cfg, mask, [0, 0], reference=reference), cfg)
    kl = (math.exp(-0.5) + 0.5 - 1) + (math.exp(1.0) - 1.0 - 1)
    assert metrics["kl"].item() == pytest.approx(kl / 3, abs=1e-5)
    assert loss.item() == pytest.approx(0.3 * kl / 3, abs=1e-6)


def test_a_penalty_without_a_reference_is_an_error() -> None:
    cfg = LossConfig(beta=0.1)
    with pytest.raises(ValueError, match="the column `reference`"):
        policy_loss(mx.zeros((1, 1)), batch_of(cfg, mx.ones((1, 1)), [1.0]), cfg)


@pytest.mark.parametrize("filler", [-1e4, 1e4, 0.0])
def test_padding_holds_whatever_it_likes(filler: float) -> None:
    cfg = LossConfig(beta=0.1)
    mask = mask_of(LENGTHS)
    clean = mx.where(mask > 0, mx.random.normal((4, 4), key=mx.random.key(0)) - 2, 0.0)
    dirty = mx.where(mask > 0, clean, filler)

    def loss(x, other):
        fields = {"anchor": other - 0.1, "reference": -other, "behaviour": other}
        return policy_loss(x, batch_of(cfg, mask, ADVANTAGES, **fields), cfg)[0]

    assert loss(dirty, dirty).item() == loss(clean, clean).item()
    gradient = mx.grad(loss)(dirty, dirty)
    assert mx.array_equal(gradient, mx.grad(loss)(clean, clean))
    assert (mx.where(mask > 0, 0.0, gradient) == 0).all().item()


def test_a_row_without_tokens_gives_nothing_and_stays_finite() -> None:
    for kind in ("grpo", "dapo", "dr_grpo"):
        cfg = LossConfig(type=kind)
        loss, _ = policy_loss(mx.zeros((1, 3)), batch_of(cfg, mx.zeros((1, 3)), [1.0]), cfg)
        assert loss.item() == 0


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize("gap", [100.0, -100.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_ratios_beyond_reason_stay_finite(kind: str, gap: float, advantage: float) -> None:
    cfg = LossConfig(type=kind, beta=0.1)
    current = mx.array([[-1.0 + min(gap, 0), -2.0]])
    fields = {"anchor": current - gap, "reference": current + gap, "behaviour": current - gap}
    batch = batch_of(cfg, mx.ones((1, 2)), [advantage], **fields)
    loss, gradient = mx.value_and_grad(lambda x: policy_loss(x, batch, cfg)[0])(current)
    assert mx.isfinite(loss).item()
    assert mx.isfinite(gradient).all().item()


def test_whatever_the_caller_leaves_on_padding_or_types_its_mask() -> None:
    cfg = LossConfig()
    mask = mask_of([2, 1])
    clean = batch_of(cfg, mask, [1.0, -1.0])
    expected = policy_loss(mx.zeros((2, 2)) - 1, clean, cfg)[0].item()
    rubbish = mx.where(mask > 0, mx.array([1.0, -1.0])[:, None], mx.nan)
    odd = of_columns(mask > 0, mx.where(mask > 0, clean.weights, 7.0), rubbish)
    assert policy_loss(mx.zeros((2, 2)) - 1, odd, cfg)[0].item() == pytest.approx(expected)


def test_a_nan_of_the_sampler_does_not_keep_what_the_policy_has_left_behind() -> None:
    cfg = LossConfig(off_policy_mask_threshold=0.5)
    sampled = mx.array([[-1.0, -1.0, math.nan]])
    batch = batch_of(cfg, mx.ones((1, 3)), [-1.0], behaviour=sampled)
    _, metrics = policy_loss(mx.array([[-9.0, -9.0, -1.0]]), batch, cfg)
    assert metrics["off_policy_kept"].item() == 0
    _, metrics = policy_loss(mx.array([[-1.1, -1.1, -1.0]]), batch, cfg)
    assert metrics["off_policy_kept"].item() == 1


def test_presets_without_a_deviation() -> None:
    rewards, weights = mx.array([[1.0], [0.0], [1.0], [1.0]]), [1.0]
    rloo = advantages(rewards, weights, 4, AdvantageConfig(), PRESETS["rloo"])
    assert rloo.tolist() == pytest.approx([1 / 3, -1, 1 / 3, 1 / 3])
    dr_grpo = advantages(rewards, weights, 4, AdvantageConfig(), PRESETS["dr_grpo"])
    assert dr_grpo.tolist() == pytest.approx([0.25, -0.75, 0.25, 0.25])


def test_maxrl_never_turns_a_sign_around() -> None:
    cfg = AdvantageConfig(baseline="maxrl")
    assert advantages(mx.array([[-1.0], [0.0], [0.0], [0.0]]), [1.0], 4, cfg).tolist() == [0.0] * 4
    assert advantages(mx.array([[1.0], [0.0], [0.0], [0.0]]), [1.0], 4, cfg).tolist() == [3.0, -1.0, -1.0, -1.0]


def test_completions_that_are_no_whole_groups() -> None:
    with pytest.raises(ValueError, match="6 completions cannot be split into groups of 4"):
        advantages(mx.zeros((6, 1)), mx.array([1.0]), 4, AdvantageConfig())


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4),
    st.permutations(range(4)),
    st.integers(0, 10**6),
)
def test_the_loss_does_not_know_the_order_of_rows(kind: str, advantage: list, order: list[int], seed: int) -> None:
    cfg, index = LossConfig(type=kind), mx.array(order)
    logprobs, old = (mx.random.normal((4, 4), key=k) * 0.3 - 2 for k in mx.random.split(mx.random.key(seed)))
    batch = batch_of(cfg, mask_of(LENGTHS), advantage, anchor=old, behaviour=old - 0.1)
    shuffled = rows_of(batch, index)
    assert policy_loss(logprobs[index], shuffled, cfg)[0].item() == pytest.approx(
        policy_loss(logprobs, batch, cfg)[0].item(), abs=1e-5, rel=1e-5
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4), st.integers(0, 10**6))
def test_the_clipped_loss_is_never_below_the_best_that_the_bounds_allow(advantage: list, seed: int) -> None:
    cfg = LossConfig(type="dapo")
    logprobs, old = (mx.random.normal((4, 4), key=k) - 2 for k in mx.random.split(mx.random.key(seed)))
    batch = batch_of(cfg, mask_of(LENGTHS), advantage, anchor=old)
    best = sum(-n * (1.28 * a if a > 0 else 0.8 * a) for a, n in zip(advantage, LENGTHS, strict=True)) / sum(LENGTHS)
    assert policy_loss(logprobs, batch, cfg)[0].item() >= best - 1e-4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=8, max_size=8), st.permutations(range(4)))
def test_advantages_sum_to_zero_and_follow_their_completions(rewards: list[float], order: list[int]) -> None:
    got = column(rewards, 4, "group")
    assert sum(got[:4]) == pytest.approx(0, abs=1e-3)
    shuffled = column([rewards[i] for i in order] + rewards[4:], 4, "group")
    assert shuffled[:4] == pytest.approx([got[i] for i in order], abs=1e-3)
    assert max(map(abs, got)) <= 1.5 + 1e-3  # (n - 1) / sqrt(n) for n = 4
