"""Passes over a step's minibatches: which a recipe asks for, in which order, and one from outside the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from training.sections import pass_settings
from training.test_update import recipe as sections

from grpo.backend.ranks import Ranks
from grpo.model.policy import Policy
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare
from grpo.training import passes
from grpo.training.batches import MiniBatch
from grpo.training.passes import PASSES, PassSettings


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
        ({"top_entropy_quantile": 0.5}, Two(), ["with_top_entropy", "shared", "with_reference", "with_anchor"]),
    ],
)
def test_the_recipe_decides_which_passes_there_are(loss: dict, ranks: Ranks, expected: list[str]) -> None:
    """The quantile is of the whole step, so it comes before the step is divided."""
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
