"""Rows of an older policy beside this step's: loss and gradient against the oracle, and what metrics tell of them."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from objective.columns import of_columns, rows_of
from objective.test_oracle import LONGEST, batch_of, in_turn, measured_in_parts

from grpo.config import LossConfig
from grpo.objective import combine_metrics, policy_loss
from grpo.presets import PRESETS
from grpo.types import Batch

from oracle import PAPER, loss_and_gradient, weights  # isort: skip

MIXES = [(0, 4), (1, 2, 5), (0, 1, 2, 3, 4, 5)]
WITH_RATIO = [name for name in PRESETS if PRESETS[name].surrogate != "reinforce"]


@pytest.mark.quick_cases("grpo", "gspo", "gspo_token", "cispo", "sapo", "vespo", "gmpo", "dppo")
@pytest.mark.parametrize("name", WITH_RATIO)
def test_loss_and_gradient_of_mixed_rows(name: str) -> None:
    """A stale row's ratios are to `behaviour`, in a first pass (no anchor) as in later ones (whatever the anchor)."""
    for index, (spread, bound, penalty, correction) in enumerate(in_turn(PRESETS[name].surrogate, whole=False)):
        settings = {**bound, **penalty, **correction}
        lp, batch = batch_of(spread, index)
        rows = np.isin(np.arange(6), MIXES[index % 3])
        batch["stale"] = np.where(batch["mask"] > 0, rows[:, None] * 1.0, np.nan)
        batch["weights"] = weights(batch["mask"], PAPER[name][2], LONGEST)
        batch["behaviour"] = np.where(np.isnan(batch["behaviour"]) & rows[:, None], lp + 0.3, batch["behaviour"])
        if index % 4 == 1:  # sampled through filters
            batch["sampler"] = batch["behaviour"] + 0.2
        anchor = lp if spread == 0 else batch["anchor"]
        known = {key: value for key, value in batch.items() if key != "stale"}
        known["anchor"] = np.where(rows[:, None], batch["behaviour"], anchor)
        if spread == 0:
            del batch["anchor"]
        expected, gradient = loss_and_gradient(name, lp, known, settings)
        cfg = LossConfig(type=name, **settings)
        got, got_gradient = measured_in_parts(lp, batch, cfg, size=(6, 1, 2)[index % 3])
        assert got == pytest.approx(expected, abs=1e-6, rel=2e-6), (name, spread, settings)
        np.testing.assert_allclose(got_gradient, gradient, atol=1e-6, rtol=2e-6, err_msg=str((name, spread, settings)))


def two_rows(**changes: mx.array) -> Batch:
    """A fresh row, whose sampler said 0.1 less than its anchor, and a stale one whose policy said 3 less."""
    anchor = mx.array([[-1.0, -2.0], [-1.0, -2.0]])
    behaviour = anchor - mx.array([[0.1], [3.0]])
    stale = mx.array([[0.0, 0.0], [1.0, 1.0]])
    mask = mx.ones((2, 2))
    return replace(of_columns(mask, mask / 4, [1.0, 1.0], behaviour=behaviour, anchor=anchor, stale=stale), **changes)


def told(batch: Batch) -> dict[str, float]:
    current = mx.array([[-1.0, -2.0], [-1.0, -2.0]])[-batch.trained.shape[0] :]
    return {name: value.item() for name, value in policy_loss(current, batch, LossConfig())[1].items()}


def test_a_stale_row_is_clipped_by_its_ratio_and_hides_no_gap() -> None:
    metrics = told(two_rows())
    assert metrics["clip_ratio/high_mean"] == 0.5  # e³ is beyond the bound; the fresh row's ratio is 1
    assert (metrics["tokens"], metrics["fresh_tokens"]) == (4, 2)
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.1)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(math.exp(0.1))


def test_metrics_of_parts_are_those_of_the_whole() -> None:
    """A part of fresh rows, a part of stale rows, and a part that does not say which tokens are stale."""
    whole = two_rows()
    fresh, stale = rows_of(whole, slice(0, 1)), rows_of(whole, slice(1, 2))
    for first in (fresh, replace(fresh, stale=None)):
        combined = combine_metrics([told(stale), told(first)])
        assert combined == pytest.approx(told(whole))


def test_of_stale_rows_alone_no_gap_is_told() -> None:
    metrics = combine_metrics([told(rows_of(two_rows(), slice(1, 2)))])
    assert not [name for name in metrics if name.startswith("sampling/")]
    assert all(map(math.isfinite, metrics.values()))
    update_of_fresh = told(rows_of(two_rows(), slice(0, 1)))
    assert combine_metrics([metrics, update_of_fresh]) == pytest.approx(told(two_rows()))


def test_stale_rows_without_the_logprobs_of_their_policy_are_refused() -> None:
    with pytest.raises(ValueError, match="stale tokens need the column `behaviour`"):
        told(two_rows(behaviour=None))
