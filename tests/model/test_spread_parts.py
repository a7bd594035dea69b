"""Weights in parts, as one of two processes has them: nothing is exchanged here."""

from __future__ import annotations

import gc

import mlx.core as mx
import pytest
from conftest import make_model
from mlx.utils import tree_flatten
from training.sections import make_batches, updater, with_advantages
from training.shards_worker import SIZES
from training.test_update import groups, recipe

from grpo.backend.ranks import Ranks
from grpo.config import AdapterConfig
from grpo.generation.choice import find_decoding
from grpo.generation.rows import Line, SharedPrompt
from grpo.generation.slots import Size
from grpo.model.adapters import Adapters
from grpo.model.fsdp import Spread
from grpo.model.gathering import Gathering
from grpo.model.parts import ArrayPlace, FlatShards, Parts
from grpo.model.policy import Policy
from grpo.planning.footprint import measure_footprint


class OneOf(Ranks):
    """One of several processes, of which the others are not there."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def spread_policy(kind: str = "full") -> Policy:
    model = make_model("tied", **SIZES)
    adapters = Adapters(model, AdapterConfig(type=kind, **({} if kind == "full" else {"rank": 1})), mx.random.key(0))
    policy = Policy(model, adapters, 1.0)
    policy.spread = Spread(model, adapters, policy.split and policy.split[1], OneOf(0, 2), Ranks())
    return policy


def held(policy: Policy) -> int:
    return sum(array.nbytes for _, array in tree_flatten(policy.model.parameters()))


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("shape", [(64, 96), (97, 101), (5_000,), (4_096,)])
def test_parts_of_any_array_are_of_one_length_and_make_the_whole(n: int, shape: tuple[int, ...]) -> None:
    whole = mx.random.normal(shape, key=mx.random.key(n))
    parts = [Parts(OneOf(rank, n), Ranks()).part_of(whole) for rank in range(n)]
    assert len({part.shape for part in parts}) == 1
    assert parts[0].size % 256 == 0
    assert mx.array_equal(mx.concatenate(parts)[: whole.size].reshape(shape), whole)
    assert not mx.concatenate(parts)[whole.size :].any().item()


@pytest.mark.parametrize("n", [2, 3])
def test_scales_of_8_bits_are_divided_with_their_blocks(n: int) -> None:
    place = ArrayPlace({}, "weight", (97, 101), 97 * 101)
    scales, codes = mx.arange(39.0), mx.arange(97 * 101).reshape(97, 101) % 100  # 39 blocks of 256
    for rank in range(n):
        shards = FlatShards(Parts(OneOf(rank, n), Ranks()), {"a.weight": place})
        part = shards.part({"a.weight.m.scales": scales, "a.weight.m.codes": codes, "step": mx.array(3)})
        assert part["a.weight.m.codes"].size == 256 * part["a.weight.m.scales"].size
        first, blocks = rank * part["a.weight.m.scales"].size, part["a.weight.m.scales"]
        expected = [float(b) if b < 39 else 0.0 for b in range(first, first + blocks.size)]
        assert blocks.tolist() == expected
        assert part["step"].item() == 3
        shapes = {name: array.shape for name, array in shards.outlines(part).items()}
        assert shapes == {"a.weight.m.codes": (97, 101), "a.weight.m.scales": (39,), "step": ()}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_process_keeps_half_of_the_weights_and_decoders_keep_none(kind: str) -> None:
    policy = spread_policy(kind)
    decoding = find_decoding(policy.model)
    session = decoding.open(Size(slots=2, places=2, prefix=4, columns=3))
    session.admit([0, 1], [Line(SharedPrompt(prompt)) for prompt in ([1, 2, 3], [4, 5, 6, 7])])
    mx.eval(session.logits(mx.array([3, 7])))
    decoding.close(session)
    del session
    gc.collect()
    whole, before = held(policy), mx.get_active_memory()
    policy.spread.divide()
    gc.collect()
    assert held(policy) < 0.6 * whole
    assert before - mx.get_active_memory() > 0.4 * whole


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_rehearsal_exchanges_nothing_and_puts_everything_back(kind: str) -> None:
    policy = spread_policy(kind)
    cfg = recipe(loss={"type": "grpo"})
    batches = make_batches(with_advantages(groups(policy), cfg), cfg)
    before = dict(tree_flatten(policy.model.parameters()))
    reference = policy.adapters.state("reference")
    update = updater(policy, cfg)
    with policy.spread.rehearsing():
        found = update.gradient(batches)
        assert {path: array.shape for path, array in found.arrays.items()} == {
            path: array.shape for path, array in tree_flatten(policy.model.trainable_parameters())
        }
    assert all(array is before[path] for path, array in tree_flatten(policy.model.parameters()))
    assert all(array is reference[path] for path, array in policy.adapters.state("reference").items())
    assert not policy.is_spread


def test_the_gradient_of_spread_weights_is_not_measured_as_if_it_were_whole() -> None:
    policy = spread_policy()
    trained = [path for path, _ in tree_flatten(policy.model.trainable_parameters())]
    with policy.spread.frozen():
        left = [path for path, _ in tree_flatten(policy.model.trainable_parameters())]
        assert left == [path for path in trained if "norm" in path]
    assert [path for path, _ in tree_flatten(policy.model.trainable_parameters())] == trained
    spread = measure_footprint(policy, True)
    policy.spread = None
    whole = measure_footprint(policy, True)
    assert spread.fixed == whole.fixed
    assert 0 < spread.token < 0.9 * whole.token


def test_nor_is_it_beside_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.backend.cuda.available", lambda: True)
    monkeypatch.setattr("grpo.planning.footprint.LONG_ROWS", (128, 256))
    policy = spread_policy()
    in_parts = measure_footprint(policy, True).alone
    policy.spread = None
    whole = measure_footprint(policy, True).alone
    assert in_parts is not None
    assert whole is not None
    assert in_parts[0] + 256 * in_parts[1] < 0.9 * (whole[0] + 256 * whole[1])


def test_what_is_small_and_what_nobody_knows_how_to_use_stays_whole() -> None:
    policy = spread_policy()
    paths = {path for path, _ in tree_flatten(policy.model.parameters())}
    kept = {path for path in paths if not policy.shards.divides(path)}
    assert kept == {path for path in paths if "norm" in path}
    assert policy.shards.divides("precise.model.embed_tokens.weight")
    assert policy.shards.divides("model.layers.0.self_attn.q_proj.weight.v.codes")
    assert not policy.shards.divides("step")


@pytest.mark.parametrize("said", ["[ring] sum_scatter not supported.", "[mpi] sum_scatter not yet implemented."])
def test_where_a_backend_cannot_scatter_a_sum_parts_are_taken_of_the_whole(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    gathering = Gathering(Parts(OneOf(1, 2), Ranks()), {})
    monkeypatch.setattr(mx.distributed, "sum_scatter", refuse)
    monkeypatch.setattr(mx.distributed, "all_sum", lambda array, group=None: 2 * array)
    part = gathering._summed_part(mx.arange(512.0))
    assert part.tolist() == [2.0 * n for n in range(256, 512)]


def test_a_lost_process_does_not_count_as_a_backend_that_cannot_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[nccl] a peer is gone")

    monkeypatch.setattr(mx.distributed, "sum_scatter", fail)
    with pytest.raises(RuntimeError, match="is gone"):
        Gathering(Parts(OneOf(1, 2), Ranks()), {})._summed_part(mx.arange(512.0))
