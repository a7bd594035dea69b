"""Rows whose own prompts go on after what they share."""

from __future__ import annotations

import pytest
from ways import LONG, WAYS, asked, finish, fresh, generator_of, sampled

from grpo.backend import cuda
from grpo.generation.sampling import Sampling

OPENINGS = [(), (30, 31, 32), (33,)]


@pytest.mark.each_value
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prompt", [(12,), LONG])
def test_a_row_is_a_fresh_one_with_all_of_its_prompt(way: str, prompt: tuple[int, ...], monkeypatch) -> None:
    """With fewer slots than rows; each has as many tokens of its own as without."""
    monkeypatch.setattr(cuda, "available", lambda: False)  # `fresh` counts its draws on by stock operations' keys
    generator = generator_of(way, 2)
    engine = generator.open()
    sampling = Sampling(1.0, 20)
    rows = engine.submit(asked(prompt, n=3, sampling=sampling, openings=OPENINGS))
    finish(engine)
    for row, opening in zip(rows, OPENINGS, strict=True):
        assert tuple(row.token_ids[: len(opening)]) == opening
        assert row.longest == 20 + len(opening)
        assert row.trained == [False] * len(opening) + [True] * (len(row.token_ids) - len(opening))
        assert len(row.token_ids) - len(opening) == 20 or row.finish_reason == "stop"
        if opening:
            other = fresh(generator, row, prompt)
            assert row.token_ids[len(opening) :] == other.token_ids == row.turn
            assert row.logprobs[len(opening) :] == pytest.approx(other.logprobs, abs=2e-5)
    engine = generator.open()
    (plain,) = engine.submit(asked(prompt, sampling=sampling))
    finish(engine)
    assert sampled([plain]) == sampled(rows[:1])


def test_a_row_that_goes_on_is_before_those_that_have_not_begun() -> None:
    engine = generator_of("joined layers", 1).open()
    (row,) = engine.submit(asked(LONG, sampling=Sampling(1.0, 200)))
    finish(engine)
    others = engine.submit(asked((12,), n=2, openings=[(30,), (31,)]))
    engine.extend(row, [40])
    assert list(engine._run.seats.queue) == [row, *others]
    engine.close()


def test_there_are_as_many_openings_as_rows() -> None:
    engine = generator_of("joined layers", 1).open()
    with pytest.raises(ValueError, match="there are 1 openings for 2 rows"):
        engine.submit(asked((12,), n=2, openings=[(30,)]))


def test_batch_caches_hold_nothing_beside_the_rows_that_have_entered() -> None:
    engine = generator_of("batch caches", 2).open()
    engine.submit(asked(LONG, n=3, openings=OPENINGS))
    for _ in range(60):
        engine.step()
    assert not engine._run.seats.queue
    assert engine._run.seats._session._ready == {}
    engine.close()
