"""Long rows alone in their lines beside all that a step asks of them: passes, a teacher, older groups, offloading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import pytest
from model.test_offloading import Doubled
from training.holes import made as with_holes
from training.sections import make_minibatches
from training.test_lines_in_a_step import in_lines, scored  # noqa: F401  a fixture
from training.test_teachers import policy_of, recipe, teacher_of
from training.test_update import recipe as sections

from grpo.config import Recipe
from grpo.model.adapters import REFERENCE
from grpo.model.policy import Policy
from grpo.training import packing
from grpo.training.gradients import Gradient
from grpo.training.passes import PassSettings, passes_of
from grpo.training.teaching import Teacher, taught
from grpo.training.update import Updater
from grpo.types import Group

LOSS = {"beta": 0.1, "entropy_coef": 0.1, "top_entropy_quantile": 0.5}


def older(groups: Sequence[Group]) -> list[Group]:
    """The same groups, of which the last was sampled a step before."""
    *fresh, last = groups
    return [*fresh, replace(last, rollouts=tuple(replace(rollout, lag=1) for rollout in last.rollouts))]


def gradient(policy: Policy, cfg: Recipe, made: Sequence[Group], teacher: Teacher | None, alone: bool) -> Gradient:
    minibatches = make_minibatches(made, cfg)
    for enrich in passes_of(PassSettings(cfg.loss, dropout=True, teacher=teacher)):  # dropout: anchors by a pass
        minibatches = enrich(policy, minibatches)
    (batches,) = minibatches
    lines = [batch.lines for batch in batches if batch.lines is not None]
    assert bool(lines) == alone
    assert all(len(of_one) == 3 for of_one in lines)
    return Updater(policy, cfg.optim, cfg.loss, teacher=teacher).gradient(batches)


@pytest.mark.each_value
@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("kl", [None, "sampled", "exact", "top_k"])
def test_the_gradient_and_the_metrics_are_those_of_one_by_one(
    in_lines,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    kl: str | None,
    offloads: bool,
) -> None:
    policy = policy_of(gradient_checkpointing=True)
    policy.adapters.add(REFERENCE, {path: array - 0.02 for path, array in policy.adapters.state().items()})
    settings = {"loss": LOSS, "optim": {"micro_batch_tokens": 24}}
    cfg = sections(**settings) if kl is None else recipe(kl, **settings)
    teacher = None if kl is None else teacher_of(cfg, policy, model=kl == "exact")
    made = scored(with_holes(policy), cfg)
    made = older(made) if kl is None else taught(made)
    expected = gradient(policy, cfg, made, teacher, alone=False)
    in_lines()
    monkeypatch.setattr(packing, "WIDE", 7)  # some rows are longer
    monkeypatch.setattr(packing, "WIDEST", 0)  # several rows never share a line
    monkeypatch.setattr(packing, "EACH", 0)
    policy.vault = vault = Doubled() if offloads else None
    found = gradient(policy, cfg, made, teacher, alone=True)
    assert max(mx.abs(found.arrays[path] - array).max().item() for path, array in expected.arrays.items()) < 2e-6
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-5)
    assert ("fresh_tokens" in found.metrics) == (kl is None)
    assert vault is None or vault.stored
