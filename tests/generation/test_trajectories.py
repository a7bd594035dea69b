"""What a row of the engine leaves behind: a trajectory, with holes where tokens were put into it."""

from __future__ import annotations

import pytest
from ways import LONG, asked, finish, generator_of

from grpo.generation.generator import trajectory_of
from grpo.generation.sampling import Sampling
from grpo.types import BEHAVIOUR, SAMPLER


@pytest.mark.parametrize(
    ("changes", "columns"),
    [
        ({}, [BEHAVIOUR]),
        ({"sampling": Sampling(1.0, 200, top_k=20)}, [BEHAVIOUR, SAMPLER]),
        ({"logprobs": False}, []),
    ],
)
def test_a_row_that_was_extended_is_a_trajectory_with_a_hole(changes: dict, columns: list[str]) -> None:
    engine = generator_of("joined layers", 4).open()
    (row,) = engine.submit(asked(LONG, **changes))
    finish(engine)
    begin = len(row.token_ids)
    engine.extend(row, [50, 51, 52])
    finish(engine)
    trajectory = trajectory_of(row)
    assert trajectory.token_ids == tuple(row.token_ids)
    assert trajectory.token_ids[begin : begin + 3] == (50, 51, 52)
    assert [i for i, trained in enumerate(trajectory.trained) if not trained] == [begin, begin + 1, begin + 2]
    assert trajectory.trained_tokens == len(row.token_ids) - 3 > begin
    assert list(trajectory.columns) == columns
    assert trajectory.behaviour == (tuple(row.logprobs) if columns else None)
