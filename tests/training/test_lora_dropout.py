"""LoRA's dropout in training: in the update alone, from the seed and the place in the run, and resumed to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import shaken
from runs.driver import run, same_end
from runs.test_resume import interrupt_in
from training.sections import make_minibatches, updater, with_advantages, with_anchor
from training.test_update import groups
from training.test_update import recipe as settings

from grpo.backend.ranks import Ranks
from grpo.config import AdapterConfig, ModelConfig
from grpo.errors import UserError
from grpo.evaluation.evaluator import Evaluator
from grpo.model.adapters import Adapters
from grpo.model.dropout import LoRADropout, dropout_key
from grpo.model.load import load
from grpo.model.policy import Policy
from grpo.planning.footprint import measure_body
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare
from grpo.training.batches import batch_logprobs
from grpo.training.packing import Shape
from grpo.training.update import Gradient

DROPOUT = "adapter.dropout=0.4"


@pytest.fixture
def policy(toy_folder) -> Policy:
    """A toy policy that has learnt, with dropout in its layers."""
    model, _ = load(ModelConfig(name=str(toy_folder)))
    adapters = Adapters(model, AdapterConfig(rank=4, dropout=0.4), mx.random.key(0))
    adapters.load_state(shaken(adapters.state()))
    return Policy(model, adapters, 1.0)


def test_anchors_are_of_the_whole_adapter_and_the_ratio_is_to_them(policy) -> None:
    cfg = settings(adapter={"rank": 4, "dropout": 0.4}, optim={"num_iterations": 2, "micro_batch_tokens": 999})
    minibatches = make_minibatches(with_advantages(groups(policy), cfg), cfg)
    minibatches = with_anchor(minibatches, policy, cfg)
    ((batch,),) = minibatches
    whole, entropies = batch_logprobs(policy, batch)
    assert mx.array_equal(batch.anchor, whole)
    update = updater(policy, cfg)
    kept = update.gradient([batch])
    assert kept.metrics["sampling/sampling_logp_difference/mean"] < 1e-4  # what sampled is the whole adapter
    dropped = update.gradient([batch], mx.random.key(1))
    assert dropped.metrics["sampling/sampling_logp_difference/mean"] < 1e-4
    assert mx.array_equal(dropped.batches[0].anchor, whole)
    assert gap(kept, dropped) > 1e-3
    entropy = (entropies * batch.trained).sum().item() / batch.trained.sum().item()
    assert dropped.metrics["entropy"] == pytest.approx(entropy, rel=1e-6)  # of the policy, not of a network with holes
    holed = update.gradient([replace(batch, entropies=None)], mx.random.key(1)).metrics["entropy"]
    assert abs(holed - entropy) > 1e-4
    seen = []
    update.gradients.custom = lambda logprobs, batch, cfg: seen.append(logprobs - batch.anchor) or logprobs
    update.gradient([batch], mx.random.key(1))
    update.gradient([batch])
    assert mx.abs(seen[0] * batch.trained).max() > 1e-2
    assert mx.abs(seen[-1] * batch.trained).max() < 1e-5


def gap(one: Gradient, other: Gradient) -> float:
    return max(mx.abs(array - other.arrays[path]).max().item() for path, array in one.arrays.items())


def test_each_step_pass_minibatch_micro_batch_and_process_draws_its_own_masks(policy) -> None:
    optim = {"micro_batch_tokens": 20, "num_minibatches": 3, "num_iterations": 2, "learning_rate": 1e-9}
    cfg = settings(adapter={"rank": 4, "dropout": 0.4}, optim=optim, rollout={"prompts_per_step": 3})
    minibatches = make_minibatches(with_advantages(groups(policy), cfg), cfg)
    minibatches = with_anchor(minibatches, policy, cfg)

    def keys(rank: int, steps: tuple[int, ...]) -> list[tuple[int, ...]]:
        update, seen = updater(policy, cfg), []
        of_batch = update.gradients._loss_and_grad
        update.gradients._loss_and_grad = lambda batch, key: seen.append(key) or of_batch(batch, key)
        update.ranks = Share(rank)
        for step in steps:
            update(minibatches, step)
        return [tuple(key.tolist()) for key in seen]

    class Share(Ranks):
        """One of two processes whose gradient is not summed up with the other's."""

        def __init__(self, rank: int) -> None:
            super().__init__()
            self.rank = rank

        own = property(lambda self: (self.rank,))

    drawn = keys(0, (1, 2))
    assert len(drawn) == 2 * 2 * sum(map(len, minibatches)) > 2 * 2 * 3
    assert len(set(drawn)) == len(drawn)
    assert keys(0, (2,)) == drawn[len(drawn) // 2 :]
    assert not set(keys(1, (1, 2))) & set(drawn)
    assert updater(policy, settings())._dropout_key(1, 0, 0) is None


def test_memory_is_measured_with_dropout_on(policy, monkeypatch) -> None:
    seen = []
    dropout = LoRADropout.__call__
    monkeypatch.setattr(LoRADropout, "__call__", lambda self, x: seen.append(dropout_key()) or dropout(self, x))
    measure_body(policy, False, [Shape(1, 8, 2, 8)])
    assert seen
    assert all(key is not None for key in seen)


@pytest.mark.slow
def test_a_run_with_dropout_goes_on_to_the_bit(recipe) -> None:
    """With several updates a step and layers that are computed again; and another probability is another run."""
    text = recipe.read_text().replace("optim: {steps: 2, learning_rate: 1e-3", "optim: {steps: 4, learning_rate: 1e-2")
    recipe.write_text(text + "checkpoint: {every: 1}\n")
    settings = [DROPOUT, "optim.num_iterations=2", "optim.gradient_checkpointing=true"]
    run(recipe, *settings, "output_dir=whole")
    run(recipe, *settings, "output_dir=cut", change=interrupt_in(3, "update"))
    run(recipe, *settings, "output_dir=cut", resume=True)
    same_end(Path("whole"), Path("cut"))
    run(recipe, *settings[1:], "output_dir=without")
    with pytest.raises(AssertionError):
        same_end(Path("whole"), Path("without"))


def test_evaluation_and_rollouts_drop_nothing(recipe, monkeypatch) -> None:
    """The same weights measure the same with dropout and without, before a run and in it."""
    recipe.write_text(recipe.read_text() + "eval: {split: train, prompts: 2, samples: 2}\n")
    found = []
    for dropout in ("adapter.dropout=0.0", DROPOUT):
        prepared = prepare(load_recipe(recipe, [dropout]))
        trainer, evaluate = prepared.trainer, prepared.evaluator
        state = trainer.policy.adapters.state()
        trainer.policy.adapters.load_state({path: mx.ones_like(array) * 0.01 for path, array in state.items()})
        assert isinstance(evaluate, Evaluator)
        metrics = trainer.step(1)
        found.append([rollout.trajectory for group in metrics.groups for rollout in group.rollouts])
        trainer.policy.adapters.load_state({path: mx.ones_like(array) * 0.01 for path, array in state.items()})
        found.append(evaluate(0))
        trainer.scorer.close()
    assert found[:2] == found[2:]


def test_whole_weights_have_no_dropout(recipe) -> None:
    with pytest.raises(UserError, match=r"adapter\.dropout does nothing with adapter\.type: full"):
        load_recipe(recipe, ["adapter.type=full", DROPOUT])
    with pytest.raises(UserError, match=r"adapter\.use_rslora does nothing with adapter\.type: full"):
        load_recipe(recipe, ["adapter.type=full", "adapter.use_rslora=true"])
    with pytest.raises(UserError, match=r"adapter\.dropout: expected less than 1"):
        load_recipe(recipe, ["adapter.dropout=1.0"])
