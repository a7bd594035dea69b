"""Steps that bring several tokens: what comes out is what plain steps draw, token for token and to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import mlx.core as mx
import pytest
from ways import LONG, WAYS, asked, finish, generator_of, model_of, sampled

from grpo.generation import buffers, slots
from grpo.generation.attention import FusedRowAttention
from grpo.generation.engine import Engine
from grpo.generation.generator import Generator
from grpo.generation.rows import Line, Row, SharedPrompt, Submission
from grpo.generation.sampling import Sampling
from grpo.generation.slots import Size

SHARED = [way for way in WAYS if "cache" not in way and WAYS[way][1].__qualname__.startswith("shared")]
PROMPTS = [(9, 10, 11), (12,), LONG]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch) -> None:
    monkeypatch.setattr(slots, "width_step", lambda: 8)
    monkeypatch.setattr(buffers, "PREFILL_CHUNK", 16)


class Drafter:
    """Drafts from what rows are known to draw, right or wrong as `kind` says, in steps of these widths by turns."""

    def __init__(self, kind: str, widths: Sequence[int], known: dict[str, list[int]]) -> None:
        self.kind, self.widths, self.known = kind, widths, known
        self.steps: list[tuple[int, list[int]]] = []
        self.asked = 0
        self.turns: list[list[int]] = []

    def width(self, rows: Sequence[Row | None]) -> int:
        assert any(rows)
        self.asked += 1
        return self.widths[self.asked % len(self.widths)]

    def propose(self, rows: Sequence[Row | None], width: int) -> list[list[int]]:
        return [self._draft(row, slot, width - 1) if row is not None else [] for slot, row in enumerate(rows)]

    def stepped(self, rows: Sequence[Row | None], width: int, taken: Sequence[int], seconds: float) -> None:
        assert seconds >= 0
        assert all((row is None) == (count == 0) for row, count in zip(rows, taken, strict=True))
        self.steps.append((width, list(taken)))

    def ended(self, row: Row) -> None:
        assert row.finish_reason is not None
        self.turns.append(list(row.token_ids))

    def _draft(self, row: Row, slot: int, most: int) -> list[int]:
        right = self.known[_name(row)][len(row.token_ids) :]
        wrong = [(token + 1) % 128 for token in right]
        return {
            "right": [*right, 3, 4, 5, 6, 7, 3, 4],  # then past the row's end
            "wrong": wrong,
            "none": [],
            "one": right[: len(row.token_ids) % 2],
            "some": [*right[: (slot + len(row.token_ids)) % 4], *wrong[3:]],
            "stops": [0, 1, 2, 3, 4, 5, 6],
        }[self.kind][:most]


KINDS = ("right", "wrong", "none", "some", "stops")


def _name(row: Row) -> str:
    return str(row.key.tolist())


def both(
    generator: Generator,
    submissions: Sequence[Submission],
    kind: str,
    widths: Sequence[int],
    plain: Sequence[Row] | None = None,
) -> Drafter:
    """Sample without drafts and with them: the same, to the bit. `plain` are the rows without, if they are there."""
    plain = _rows(generator.open(), submissions) if plain is None else plain
    drafter = Drafter(kind, widths, {_name(row): list(row.token_ids) for row in plain})
    generator.speculation = drafter
    try:
        drafted = _rows(generator.open(), submissions)
    finally:
        generator.speculation = None
    same(plain, drafted, generator)
    return drafter


def _rows(engine: Engine, submissions: Sequence[Submission]) -> list[Row]:
    rows = [row for submission in submissions for row in engine.submit(submission)]
    finish(engine)
    return rows


def same(plain: Sequence[Row], drafted: Sequence[Row], generator: Generator) -> None:
    assert sampled(plain) == sampled(drafted)
    fused = isinstance(getattr(generator.decoding, "attention", None), FusedRowAttention)
    if mx.default_device() == mx.cpu and not fused:  # a GPU's way, which rounds as it likes
        assert [row.logprobs for row in plain] == [row.logprobs for row in drafted]
        assert [row.sampler_logprobs for row in plain] == [row.sampler_logprobs for row in drafted]


SAMPLINGS = {
    "greedy": Sampling(0.0, 20),
    "sampled": Sampling(1.0, 20),
    "filters": Sampling(1.2, 20, top_k=30, top_p=0.9, min_p=0.01),
    "penalty": Sampling(0.7, 20, repetition_penalty=1.5),
    "greedy penalty": Sampling(0.0, 20, repetition_penalty=1.3),
    "least": Sampling(1.0, 20, min_tokens=12),
    "stop strings": Sampling(1.0, 20, stop=("7", "3 4")),
    "repeats": Sampling(0.3, 20, max_repeats=2),
    "a turn": Sampling(1.0, 20, max_turn_tokens=7),
}


@pytest.mark.parametrize("way", ["joined layers", *(pytest.param(way, marks=pytest.mark.slow) for way in SHARED[1:])])
@pytest.mark.parametrize("how", SAMPLINGS)
@pytest.mark.parametrize("most", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_drafts_change_nothing(way: str, how: str, most: int) -> None:
    """Prompts are shared by two rows each; there are fewer slots than rows, or slots for all."""
    generator = generator_of(way, most)
    submissions = [asked(prompt, i, n=2, keep=False, sampling=SAMPLINGS[how]) for i, prompt in enumerate(PROMPTS)]
    plain = _rows(generator.open(), submissions)
    for kind, widths in zip(KINDS, ([4], [8], [4], [4, 8, 1, 2], [8]), strict=True):
        drafter = both(generator, submissions, kind, widths, plain)
        wide = [taken for width, taken in drafter.steps if width > 1]
        assert bool(wide) == (kind != "none")
        if kind == "right" and how != "greedy penalty":  # those rows are short
            assert max(max(taken) for taken in wide) == 4
        if kind == "wrong":
            assert max(max(taken) for taken in wide) == 1
        assert len(drafter.turns) == 6


@pytest.mark.quick_cases("joined layers")
@pytest.mark.parametrize("way", SHARED)
def test_rows_of_several_ways_to_sample_are_drafted_together(way: str) -> None:
    generator = generator_of(way, 5)
    submissions = [
        asked(
            PROMPTS[i % 3],
            i,
            n=1,
            keep=False,
            sampling=sampling,
            logprobs=i % 2 == 0,
            openings=[[20, 21]] if i % 3 else (),
        )
        for i, sampling in enumerate(SAMPLINGS.values())
    ]
    plain = _rows(generator.open(), submissions)
    for kind in KINDS:
        both(generator, submissions, kind, [4, 8, 8, 1], plain)


@pytest.mark.each_value
@pytest.mark.parametrize("way", SHARED)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_rows_are_the_same_to_the_bit(way: str, count: int) -> None:
    generator = generator_of(way, 4)
    generator.stop_ids = frozenset()
    submissions = [asked(LONG, 1, n=count, keep=False, sampling=Sampling(1.0, 30))]
    plain = _rows(generator.open(), submissions)
    for kind in ("right", "some"):
        both(generator, submissions, kind, [2, 4, 8, 1], plain)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in SHARED])
def test_caches_that_give_nothing_back_are_decoded_plainly(way: str) -> None:
    generator = generator_of(way, 3)
    drafter = both(generator, [asked(PROMPTS[0], 1, n=4, keep=False, sampling=Sampling(1.0, 9))], "right", [8])
    assert "cannot take back tokens" in (generator.decoding.narrow or "")
    assert not drafter.asked
    assert not drafter.steps


def test_a_step_is_as_wide_as_its_drafts() -> None:
    generator = generator_of("joined layers", 4)
    generator.stop_ids = frozenset()
    submissions = [asked(PROMPTS[0], 1, n=4, keep=False, sampling=Sampling(1.0, 40))]
    drafter = both(generator, submissions, "one", [8])
    assert {width for width, _ in drafter.steps} == {1, 2}


@pytest.mark.quick_cases("joined layers", "overlapping steps")
@pytest.mark.parametrize("way", SHARED)
def test_turns_go_on_after_drafts(way: str) -> None:
    """Rows that end in the midst of a draft are kept and extended; others are parked and released meanwhile."""
    generator = generator_of(way, 3)

    def conversation() -> list[Row]:
        engine = generator.open()
        rows = [row for i in range(3) for row in engine.submit(asked(PROMPTS[i], i, n=2, sampling=Sampling(1.0, 50)))]
        for step in range(40):
            engine.step()
            if step == 3:
                engine.park(rows[0])
                engine.release(rows[5])
            for row in rows:
                if row.state in ("waiting", "parked") and row.room > 4:
                    engine.extend(row, [80, 81, 82])
        for row in rows:
            engine.release(row)
        return rows

    def longest() -> list[Row]:
        engine = generator.open()
        rows = [row for i in range(3) for row in engine.submit(asked(PROMPTS[i], i, n=2, sampling=Sampling(1.0, 50)))]
        while engine.busy:
            engine.step()
            for row in rows:
                if row.state == "waiting" and row.room > 4:
                    engine.extend(row, [80, 81, 82])
        return rows

    plain = longest()
    for kind in KINDS:
        generator.speculation = Drafter(kind, [4, 8, 1], {_name(row): list(row.token_ids) for row in plain})
        try:
            drafted, cut = longest(), conversation()
        finally:
            generator.speculation = None
        same(plain, drafted, generator)
        for i in (1, 2, 3, 4):  # those that were neither parked nor released early
            assert cut[i].token_ids == plain[i].token_ids[: len(cut[i].token_ids)]


@pytest.mark.each_value
@pytest.mark.parametrize("way", ["joined layers", "the model's layers"])
@pytest.mark.parametrize(("heads", "shared"), [(4, 1), (4, 2), (4, 4)])
def test_neither_width_nor_neighbors_nor_columns_change_a_bit(way: str, heads: int, shared: int) -> None:
    """For as many tokens as MKL's sums need to be split in several ways, of which each head reads its own part."""
    if mx.default_device() != mx.cpu:
        pytest.skip("a GPU rounds by its own rules")
    model = model_of("qwen3", num_attention_heads=heads, num_key_value_heads=shared, head_dim=32)
    decoding, tokens = WAYS[way][1](model), [38, *(7 * i % 120 for i in range(280))]

    def logits(widths: Sequence[int], count: int, columns: int, ahead: int) -> mx.array:
        session, prompt = decoding.open(Size(count, 1, 29, columns)), SharedPrompt(tuple(range(9, 39)))
        session.admit(list(range(count)), [Line(prompt) for _ in range(count)])
        session._slots.starts[-1] -= ahead  # a neighbor that has decoded more
        found, begin, turns = [], 0, itertools.cycle(widths)
        while begin < len(tokens):
            part = tokens[begin : begin + next(turns)]
            found.append(session.wide(mx.array([part] * count))[0])
            mx.eval(found)
            session.accept([len(part)] * count)
            begin += len(part)
        return mx.concatenate(found)

    expected = logits([1], 5, 600, 0)
    assert mx.array_equal(logits([8], 1, 288, 0), expected)
    assert mx.array_equal(logits([1, 2, 4, 8], 3, 600, 290), expected)
