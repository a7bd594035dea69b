"""A CPU reads as few columns as it may: what is decoded does not depend on how many."""

import mlx.core as mx
import pytest
from generation.ways import LONG, asked, finish, generator_of

from grpo.generation import slots
from grpo.generation.products import few_rows
from grpo.generation.sampling import Sampling

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU rounds by its own rules")


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("head", [16, 64, 80, 128])
def test_scores_and_sums_over_any_number_of_columns(rows: int, head: int) -> None:
    """Up to 384 of them: MKL adds up more in parts on an Intel processor, as many as there are columns."""
    few, key = few_rows(rows), mx.random.split(mx.random.key(rows * head), 3)
    queries, keys = mx.random.normal((2, few, head), key=key[0]), mx.random.normal((2, 384, head), key=key[1])
    weights = mx.random.uniform(shape=(2, few, 384), key=key[2])
    scores = queries @ keys.swapaxes(-1, -2)
    for filled in (3, 16, 30, 100, 250, 350):
        seen = weights * (mx.arange(384) < filled)
        summed = seen @ keys
        for width in {-(-filled // step) * step for step in (8, 16, 32, 64)}:
            assert mx.array_equal(queries @ keys[:, :width].swapaxes(-1, -2), scores[..., :width]), width
            assert mx.array_equal(seen[..., :width] @ keys[:, :width], summed), width


@pytest.mark.parametrize("way", ["joined layers", "the model's layers"])
def test_rows_have_the_same_bits_whatever_the_step(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for step in (slots.width_step(), 8, 64):
        monkeypatch.setattr(slots, "width_step", lambda step=step: step)
        engine = generator_of(way, 4).open()
        submissions = [asked(prompt, i, n=2, keep=False, sampling=Sampling(1.0, 70), logprobs=True)
                       for i, prompt in enumerate([(9, 10, 11), LONG])]  # fmt: skip
        rows = [row for submission in submissions for row in engine.submit(submission)]
        finish(engine)
        found.append([(row.token_ids, row.logprobs) for row in rows])
        assert max(len(row.token_ids) for row in rows) > 16
    assert found[0] == found[1] == found[2]


def test_few_columns_are_read_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made = slots.Slots(slots.Size(1, 1, 4, 200))
    made.admit([0], [0], [4], [17])
    assert made.view().width == 32
    monkeypatch.setattr(slots, "on_gpu", lambda: True)
    assert made.view().width == 64
