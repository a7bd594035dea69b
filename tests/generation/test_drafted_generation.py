"""Drafts and their controller in the generator: they change how many steps there are, and nothing else."""

import mlx.core as mx
import pytest
from ways import asked, finish, generator_of, sampled

from grpo.generation import controller
from grpo.generation.controller import Always, Automatic
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling

REQUESTS = [Request((9, 10, 11), n=3), Request((12, 9, 10), n=3)]
GREEDY = Sampling(0.0, 24)
to_the_bit = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU rounds wide products otherwise")


@pytest.fixture
def generator(request):
    made = generator_of("joined layers", 4)
    yield made
    made.speculation = None


def epochs(generator: Generator, sampling: Sampling, count: int = 3) -> list[object]:
    """Everything that so many epochs give: tokens, logprobs, texts and why they end."""
    return [generator.generate(REQUESTS, sampling, mx.random.key(epoch)) for epoch in range(count)]


@pytest.mark.each_value
@to_the_bit
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_epochs_with_drafts_are_those_without(generator, width: int, temperature: float) -> None:
    sampling = Sampling(temperature, 24, max_repeats=4)
    plain = epochs(generator, sampling)
    generator.speculation = speculation = Always(width)
    assert epochs(generator, sampling) == plain
    assert speculation.tally.wide_turns > 0
    if temperature == 0:
        assert speculation.tally.wide_tokens > 1.3 * speculation.tally.wide_turns


@to_the_bit
def test_whatever_the_controller_decides_tokens_are_the_same(generator, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = epochs(generator, GREEDY, 6)
    for name in ("WORTH", "HOPED"):  # as if every width paid
        monkeypatch.setattr(controller, name, 0.0)
    monkeypatch.setattr(controller, "AT_RISK", float("inf"))
    generator.speculation = speculation = Automatic()
    assert epochs(generator, GREEDY, 6) == plain
    tally = speculation.tally
    assert 0 < tally.wide_turns < tally.turns
    assert generator.drafted()["turns"] > 0
    assert generator.drafted()["turns"] == 0  # since it was last asked


@to_the_bit
def test_a_row_that_a_tool_answers_is_drafted_from_that(generator) -> None:
    def talked() -> list[object]:
        engine = generator.open()
        (row,) = engine.submit(asked((9, 10, 11), sampling=Sampling(0.0, 40, max_turn_tokens=8)))
        finish(engine)
        engine.extend(row, [20, 21, 22, 9, 10, 11])
        finish(engine)
        found = [*sampled([row]), list(row.logprobs), row.trained]
        engine.close()
        return found

    plain = talked()
    generator.speculation = speculation = Always(4)
    talked()
    speculation.tally.clear()
    assert talked() == plain
    assert speculation.tally.wide_tokens > 2 * speculation.tally.wide_turns  # it was said before
    assert sum(map(len, speculation.drafts.memory.of((9, 10, 11)))) == 2 * len(plain[2])


def test_it_is_said_how_tokens_are_drafted(generator) -> None:
    assert not any("speculation" in line for line in generator.describe())
    assert generator.drafted() == {}
    generator.speculation = Always(2)
    assert generator.describe()[-1] == "speculation: every step feeds a row 1 draft (rollout.speculate: 1)"
    generator.speculation = Automatic()
    assert generator.describe()[-1].startswith("speculation: drafts tokens when")
    generator.speculation.most = 1
    assert generator.describe()[-1] == "speculation: off, because memory has no room for steps of several tokens"
    generator.speculation = Always(8)
    generator.speculation.most = 4
    said = "speculation: every step feeds a row 3 drafts, because memory has no room for more (rollout.speculate: 7)"
    assert generator.describe()[-1] == said


def test_caches_that_cannot_take_tokens_back_decode_without_drafts_and_say_so() -> None:
    generator = generator_of("batch caches", 4)
    plain = epochs(generator, GREEDY, 1)
    generator.speculation = speculation = Always(8)
    try:
        assert epochs(generator, GREEDY, 1) == plain
        assert generator.describe()[-1].startswith("speculation: off, because mlx-lm's batch caches cannot take back")
        assert generator.drafted() == {}
        assert not speculation.drafts.memory.others()  # nothing is kept for nobody
    finally:
        generator.speculation = None
