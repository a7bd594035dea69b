"""Attention keeps the scores of short passes alone, and the footprint knows which."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import make_model
from planning.loads import workload
from training.test_update import recipe

from grpo.config import AdapterConfig
from grpo.model import attention
from grpo.model.adapters import Adapters
from grpo.model.policy import Policy
from grpo.planning.choosing import Choice
from grpo.planning.footprint import Footprint, extent, measure_body, measure_footprint, passes_of
from grpo.planning.machines import Machine
from grpo.training.packing import Shape


def policy_with(heads: int) -> Policy:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "max_position_embeddings": 4096}
    of_heads = {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 4}
    model = make_model("tied", num_hidden_layers=2, **sizes, **of_heads)
    return Policy(model, Adapters(model, AdapterConfig(rank=8), mx.random.key(0)), 1.0)


@pytest.mark.parametrize(
    ("shape", "checkpointing", "pairs"),
    [
        (Shape(2, 8, 4, 10), False, 128 + 700),  # 2 × 8², and 4 × 10 × 18, of which 700 at most
        (Shape(2, 8, 4, 10), True, 700),
        (Shape(20, 8, 1, 10), True, 700),
        (Shape(1, 1, 1, 1, 2, 30), False, 700),  # two lines of 30 places
    ],
)
def test_of_each_pass_so_many_pairs_are_held_at_most(shape: Shape, checkpointing: bool, pairs: int) -> None:
    assert extent(shape, True, checkpointing, 700)[1] == pairs
    assert extent(shape, True, checkpointing)[1] > pairs


def test_a_footprint_counts_no_more_pairs_than_are_held() -> None:
    footprint = Footprint(0, 0.0, 1_000.0, 0, 1, True, True, most_pairs=700)
    assert footprint.bytes(Shape(2, 8, 4, 10)) == 700_000
    assert replace(footprint, most_pairs=None).bytes(Shape(2, 8, 4, 10)) == 720_000


@pytest.mark.parametrize("heads", [4, 32])
def test_the_policy_says_from_where_on_no_scores_are_kept(heads: int) -> None:
    """Seen in memory: a row that is one token too long takes less than the longest whose scores are kept."""
    policy = policy_with(heads)
    assert policy.most_pairs == attention.KEPT // heads
    length = next(n for n in range(2**12, 0, -1) if n * (n + 16) <= policy.most_pairs)
    kept, not_kept = measure_body(policy, False, [Shape(1, 16, 1, length), Shape(1, 16, 1, length + 8)])
    assert not_kept < 0.7 * kept


@pytest.mark.parametrize("heads", [4, 32])
def test_scores_that_are_kept_are_in_the_line_whatever_the_number_of_heads(heads: int) -> None:
    policy = policy_with(heads)
    footprint = measure_footprint(policy, False)
    length = int(policy.most_pairs**0.5) - 16
    shape = Shape(1, 16, 1, length)
    (seen,) = measure_body(policy, False, [shape])
    tokens, pairs = extent(shape, True, False, policy.most_pairs)
    assert footprint.token * tokens + footprint.pair * pairs == pytest.approx(seen, rel=0.25)


@pytest.mark.parametrize(("limited", "most"), [(True, 50_000), (False, 50_000), (True, None), (True, 10**7)])
def test_within_a_limit_shorter_rows_whose_scores_are_kept_are_tried_too(limited: bool, most: int | None) -> None:
    """Of rows of 24 + 600 tokens no scores are kept, of 16 rows of 24 + some 30 tokens they are."""
    cfg = recipe(
        rollout={"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 600},
        optim={"micro_batch_tokens": "auto", "gradient_checkpointing": False},
    )
    tried: list[Shape] = []

    def footprint(checkpointing: bool) -> Footprint:
        return Footprint(0, 1.0, 1.0, 0, 1, True, checkpointing, most_pairs=most)

    def seen(_, shape: Shape) -> int:
        tried.append(shape)
        return sum(passes_of(shape, True)) if shape.length < 600 else 1

    machine = Machine(2**40, False, False, limited=limited)
    found = Choice(machine, workload(cfg, 24), 2**40, 2, footprint, seen).make()
    longest, *worse = tried
    assert longest.length == 600
    if not limited or most != 50_000:
        assert not worse
        assert found.shape == longest
        return
    (shape,) = worse
    assert 0.6 * most < max(passes_of(shape, True)) <= most < max(passes_of(longest, True))
    assert found.shape == shape
    assert found.bytes == sum(passes_of(shape, True))
