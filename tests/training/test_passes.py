"""Passes over a step's minibatches: which a recipe asks for, in which order, and one from outside the package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import pytest
from training.sections import make_minibatches, pass_settings, with_advantages
from training.test_update import groups
from training.test_update import recipe as sections

from grpo.backend.ranks import Ranks
from grpo.errors import RunError
from grpo.model.logprobs import logprobs_and_entropies as both
from grpo.model.policy import Policy
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare
from grpo.training import passes
from grpo.training.batches import MiniBatch
from grpo.training.passes import PASSES, PassSettings
from grpo.types import Batch


class Two(Ranks):
    """The second of two processes."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size = 1, 2


@pytest.mark.parametrize(
    ("loss", "ranks", "expected"),
    [
        ({}, Ranks(), ["with_reference", "with_anchor"]),
        ({"kl_in": "reward", "beta": 0.1}, Ranks(), ["with_anchor"]),
        ({"top_entropy_quantile": 0.5}, Two(), ["shared", "with_top_entropy", "with_reference", "with_anchor"]),
    ],
)
def test_the_recipe_decides_which_passes_there_are(loss: dict, ranks: Ranks, expected: list[str]) -> None:
    """With several processes each looks at its share alone."""
    settings = replace(pass_settings(sections(loss=loss)), ranks=ranks)
    assert [enrich.__name__ for needed, enrich in PASSES if needed(settings)] == expected
    assert len(passes.passes_of(settings)) == len(expected)


def test_a_pass_from_outside_is_a_function_and_a_row_of_the_table(recipe, monkeypatch) -> None:
    """This one halves all weights, after the anchor is there."""
    seen: list[bool] = []

    def halved(policy: Policy, minibatches: Sequence[MiniBatch], settings: PassSettings) -> list[MiniBatch]:
        seen.extend(batch.anchor is not None for batches in minibatches for batch in batches)
        return [[replace(batch, weights=batch.weights / 2) for batch in batches] for batches in minibatches]

    def grad_norm(*overrides: str) -> float:
        trainer = prepare(load_recipe(recipe, ["optim.num_minibatches=2", "loss.beta=0.01", *overrides])).trainer
        norm = trainer.step(1).values["grad_norm"]
        trainer.scorer.close()
        return norm

    whole = grad_norm()
    rows = [*PASSES, (lambda settings: settings.loss.type == "dapo", halved)]
    monkeypatch.setattr(passes, "PASSES", rows)
    assert grad_norm() == pytest.approx(whole / 2, rel=1e-3)
    assert seen[0] is False  # the first minibatch's anchor is the current policy
    assert seen[-1] is True
    seen.clear()
    grad_norm("loss.type=grpo")
    assert seen == []


def batch(rows: int = 2, tokens: int = 3) -> Batch:
    columns = mx.zeros((rows, tokens))
    prompt = mx.zeros((1, 4), mx.int32), mx.array([4]), mx.zeros(rows, mx.int32)
    return Batch(*prompt, columns.astype(mx.int32), columns, columns, columns, beta=mx.array(0.1))


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, "pass mine: it must return 2 minibatches, each a list of batches; it returned None"),
        ([[batch()]], "it must return 2 minibatches, each a list of batches; it returned 1 of them"),
        ([batch(), batch()], "it must return 2 minibatches, each a list of batches; it returned [Batch("),
        ([[mx.zeros(3)], []], "pass mine: a minibatch must be a list of grpo.Batch; it contains array("),
        (
            [[], [replace(batch(), anchor=mx.zeros(3))]],
            "pass mine: its column anchor has shape (3,), but needs the shape of the batch's tokens, (2, 3): one",
        ),
        ([[], [replace(batch(), weights=mx.zeros((2, 4)))]], "its column weights has shape (2, 4)"),
    ],
)
def test_a_pass_that_returns_another_shape_is_named(monkeypatch, result, said: str) -> None:
    def mine(policy, minibatches, settings):
        return result

    monkeypatch.setattr(passes, "PASSES", [(lambda _: True, mine)])
    (made,) = passes.passes_of(pass_settings(sections()))
    with pytest.raises(RunError, match=re.escape(said)):
        made(None, [[batch()], [batch()]])


def test_a_pass_may_leave_out_batches_and_change_columns(monkeypatch) -> None:
    changed = [[], [replace(batch(), anchor=mx.ones((2, 3)))]]
    monkeypatch.setattr(passes, "PASSES", [(lambda _: True, lambda *_: changed)])
    (made,) = passes.passes_of(pass_settings(sections()))
    assert made(None, [[batch()], [batch()]]) is changed


def test_the_reference_and_the_anchor_take_no_entropies(make_policy, monkeypatch) -> None:
    """Nobody reads them. With dropout the anchor's are read."""
    policy, cfg = make_policy().policy, sections(loss={"beta": 0.1}, optim={"num_minibatches": 2})
    minibatches = make_minibatches(with_advantages(groups(policy), cfg), cfg)
    computed: list[bool] = []
    monkeypatch.setattr(
        "grpo.model.logprobs.logprobs_and_entropies", lambda *given: computed.append(True) or both(*given)
    )
    first, *others = passes.with_anchor(
        policy, passes.with_reference(policy, minibatches, pass_settings(cfg)), pass_settings(cfg)
    )
    assert all(batch.reference is not None for batch in first)
    assert all(batch.anchor is not None for batches in others for batch in batches)
    assert not computed
    dropped = replace(pass_settings(cfg), dropout=True)
    assert passes.with_anchor(policy, minibatches, dropped)[0][0].entropies is not None
    assert computed
