"""An update in lanes, as on a CPU: the numbers do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import shaken
from training.sections import make_batches, updater, with_advantages, with_anchor, with_reference, with_top_entropy
from training.test_packing import row
from training.test_update import difference, groups, recipe

from grpo.backend import blas
from grpo.backend import lanes as streams
from grpo.config import AdapterConfig, ModelConfig
from grpo.model.adapters import Adapters
from grpo.model.load import load
from grpo.model.policy import Policy
from grpo.training import lanes
from grpo.training.lanes import lanes_worth
from grpo.training.packing import Packing, pack
from grpo.training.update import Gradient

KINDS: dict[str, dict[str, object]] = {
    "lora": {"rank": 4},
    "dropout": {"rank": 4, "dropout": 0.4},
    "dora": {"rank": 4, "type": "dora"},
    "full": {"type": "full"},
}


@pytest.fixture
def in_lanes(monkeypatch) -> Callable[[int], list[int]]:
    """Pretends that the machine has so many cores; returns a list that gets each number of lanes that is used."""

    genuine = streams._in_lanes

    def pretend(cores: int) -> list[int]:
        used: list[int] = []
        monkeypatch.setattr(streams, "cpu_cores", lambda: cores)
        monkeypatch.setattr(
            streams, "_in_lanes", lambda build, items, number: (used.append(number), genuine(build, items, number))[1]
        )
        return used

    return pretend


def policy_of(folder, kind: str, **arguments) -> Policy:
    model, _ = load(ModelConfig(name=str(folder)))
    settings = AdapterConfig.model_validate(KINDS.get(kind, KINDS["lora"]), strict=False)
    adapters = Adapters(model, settings, mx.random.key(0))
    if kind != "full":
        adapters.load_state(shaken(adapters.state()))
    return Policy(model, adapters, 1.0, **arguments)


def gradients(policy: Policy, cores: int, in_lanes, **loss) -> tuple[Gradient, list[int]]:
    """Of three groups in four micro-batches or more, with a reference, and the numbers of lanes that were used."""
    cfg = recipe(loss={"beta": 0.1, **loss}, optim={"micro_batch_tokens": 24})
    used = in_lanes(cores)
    batches = with_reference(make_batches(with_advantages(groups(policy), cfg), cfg), policy, cfg)
    assert len(batches) > 3
    return updater(policy, cfg).gradient(batches, mx.random.key(7)), used


@pytest.mark.parametrize("kind", [*KINDS, "checkpointed", "apart"])
def test_the_gradient_is_the_same_to_the_bit_for_any_number_of_lanes(toy_folder, in_lanes, kind: str) -> None:
    ways = {"checkpointed": {"gradient_checkpointing": True}, "apart": {"share_prompts": False}}
    policy = policy_of(toy_folder, kind, **ways.get(kind, {}))
    alone, none = gradients(policy, 1, in_lanes, entropy_coef=0.01)
    for cores in (2, 3):
        made, used = gradients(policy, cores, in_lanes, entropy_coef=0.01)
        assert used == [cores, cores]  # the reference, and the gradient
        assert (made.loss, made.metrics) == (alone.loss, alone.metrics)
        assert all(mx.array_equal(made.arrays[path], array) for path, array in alone.arrays.items())
        assert all(
            mx.array_equal(here.anchor, there.anchor) and mx.array_equal(here.reference, there.reference)
            for here, there in zip(made.batches, alone.batches, strict=True)
        )
    assert none == []


def test_one_lane_where_the_products_or_the_gradient_are_large(toy_folder, in_lanes, monkeypatch) -> None:
    policy = policy_of(toy_folder, "lora")
    monkeypatch.setattr(lanes, "MOST_MULTIPLICATIONS", 1)
    assert gradients(policy, 2, in_lanes)[1] == []
    monkeypatch.undo()
    monkeypatch.setattr(lanes, "MOST_GRADIENT", 1)
    assert gradients(policy, 2, in_lanes)[1] == []


def test_micro_batches_go_one_after_the_other_if_told_so(toy_folder, in_lanes) -> None:
    policy, cfg = policy_of(toy_folder, "lora"), recipe(optim={"micro_batch_tokens": 24})
    used, update = in_lanes(2), updater(policy, cfg)
    batches = make_batches(with_advantages(groups(policy), cfg), cfg)
    update.gradient(batches)
    assert used == [2]
    update.gradients.alone = True
    update.gradient(batches)
    assert used == [2]


def test_passes_in_lanes_give_what_they_give_alone(toy_folder, in_lanes) -> None:
    policy = policy_of(toy_folder, "lora")
    cfg = recipe(loss={"top_entropy_quantile": 0.5}, adapter={"dropout": 0.1}, optim={"micro_batch_tokens": 40})
    found = []
    for cores in (1, 2):
        used = in_lanes(cores)
        batches = make_batches(with_advantages(groups(policy), cfg), cfg)
        (masked,) = with_top_entropy([batches], policy, cfg)
        (anchored,) = with_anchor([masked], policy, cfg)
        found.append(anchored)
        assert used == [2, 2] * (cores == 2)
    for here, there in zip(*found, strict=True):
        assert mx.array_equal(here.weights, there.weights)
        assert mx.array_equal(here.anchor, there.anchor)
        assert mx.array_equal(here.entropies, there.entropies)


def test_a_step_is_cut_for_two_lanes_with_the_same_gradient(make_policy) -> None:
    policy, cfg = make_policy().policy, recipe(optim={"micro_batch_tokens": 999})
    scored = with_advantages(groups(policy), cfg)
    whole, cut = make_batches(scored, cfg), make_batches(scored, cfg, lanes_worth(policy.model, cfg.loss))
    assert (len(whole), len(cut)) == (1, 2)
    assert [batch.token_ids.shape[0] for batch in cut] == [6, 6]
    update = updater(policy, cfg)
    assert difference(update.gradient(whole).arrays, update.gradient(cut).arrays) < 1e-6


def test_what_is_not_cut(toy_folder, monkeypatch) -> None:
    """A loss that depends on the micro-batches, a large gradient, and an update on a GPU."""
    model = policy_of(toy_folder, "lora").model
    assert lanes_worth(model, recipe().loss) == 2
    assert lanes_worth(model, recipe(loss={"type": "bnpo"}).loss) == 1
    monkeypatch.setattr(lanes, "MOST_GRADIENT", 1)
    assert lanes_worth(model, recipe().loss) == 1
    monkeypatch.undo()
    monkeypatch.setattr(lanes, "on_gpu", lambda: True)
    assert lanes_worth(model, recipe().loss) == 1


def test_micro_batches_side_by_side_have_about_equal_numbers_of_rows() -> None:
    rows = [row(prompt, 4) for prompt in (40, 45, 50, 55) for _ in range(8)]
    rule = Packing(tokens=150, rows=16, group=8, parts=2)
    assert [len(part) for part, _ in pack(rows, rule)] == [8, 8, 8, 8]
    assert [len(part) for part, _ in pack(rows, replace(rule, parts=1))] == [15, 9, 8]  # as many as fit


def test_a_loss_of_the_users_own_goes_through_one_lane(toy_folder, in_lanes) -> None:
    """It may read what is not computed yet, as this factor: two lanes must not both compute that."""
    policy, cfg = policy_of(toy_folder, "lora"), recipe(optim={"micro_batch_tokens": 40})
    used = in_lanes(2)
    factor = mx.exp(-mx.arange(4)).sum()
    batches = make_batches(with_advantages(groups(policy), cfg), cfg)
    updater(policy, cfg, custom=lambda current, batch, _: -factor * batch.advantages * current).gradient(batches)
    assert len(batches) > 2
    assert used == []


def test_an_error_in_the_midst_of_lanes_leaves_everything_as_it_was(toy_folder, in_lanes, monkeypatch) -> None:
    policy = policy_of(toy_folder, "dropout")
    cfg = recipe(optim={"micro_batch_tokens": 40}, adapter={"dropout": 0.4})
    in_lanes(2)
    update = updater(policy, cfg)
    batches = make_batches(with_advantages(groups(policy), cfg), cfg)
    key, stream, threads = mx.random.key(3), mx.default_stream(mx.cpu), blas.most_threads()
    before, expected = policy.adapters.state(), update.gradient(batches, key).arrays
    genuine, calls = update.gradients._of_one, []

    def failing(given):
        calls.append(given)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return genuine(given)

    monkeypatch.setattr(update.gradients, "_of_one", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        update([batches], 1)
    assert (mx.default_stream(mx.cpu), blas.most_threads()) == (stream, threads)
    assert all(mx.array_equal(array, before[path]) for path, array in policy.adapters.state().items())
    assert update.optimizer.state["step"].item() == 0
    found = update.gradient(batches, key).arrays  # the third call is over
    assert all(mx.array_equal(found[path], array) for path, array in expected.items())
