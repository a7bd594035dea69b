"""The thread that decodes: the trainer's own tokens, in turns of one adapter each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import pytest
from serving import decoding

from grpo.config import AdapterConfig, ModelConfig
from grpo.errors import UserError
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.adapters import Adapters
from grpo.model.load import load
from grpo.serving.asks import Ask
from grpo.serving.decoder import DecodingLoop, DecodingThread
from grpo.serving.refusals import Refusal
from grpo.serving.shelf import Shelf
from grpo.types import Trajectory

PROMPT, LONGER = (5, 6, 7), (9, 8, 7, 6, 5, 4)
ASK = Ask("base", PROMPT, Sampling(1.0, 12), n=3, seed=11, logprobs=True)


class Told:
    """Collects what a decoder tells of one request."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Any] = SimpleQueue()
        self.times = 0

    def __call__(self, told: Any) -> None:
        self.queue.put(told)

    def rows(self, n: int) -> list[tuple[list[int], list[float], str]]:
        """Token ids, logprobs and the end of all completions."""
        found: list[Any] = [([], [], None) for _ in range(n)]
        while any(end is None for _, _, end in found):
            told = self.queue.get(timeout=60)
            assert not isinstance(told, Refusal), str(told)
            self.times += 1
            for piece in told:
                ids, logprobs, _ = found[piece.index]
                found[piece.index] = (ids + list(piece.token_ids), logprobs + list(piece.logprobs), piece.ended)
        return found


def answered(decoder: DecodingLoop, ask: Ask) -> list[tuple[list[int], list[float], str]]:
    told = Told()
    decoder.submit(ask, told)
    return told.rows(ask.n)


def trained(folder: Path, ask: Ask, adapter: dict[str, mx.array] | None = None, slots: int = 8) -> list[Trajectory]:
    """What the trainer samples for the same request."""
    model, tokenizer = load(ModelConfig(name=str(folder)))
    if adapter is not None:
        Adapters(model, AdapterConfig(rank=4), mx.random.key(0)).load_state(adapter)
    request = Request(ask.prompt_ids, ask.n, ask.seed)
    return Generator(model, tokenizer, slots).generate([request], ask.sampling, mx.random.key(0))[0]


def compared(found: Sequence[tuple[list[int], list[float], str]], expected: Sequence[Trajectory]) -> None:
    assert [ids for ids, _, _ in found] == [list(one.token_ids) for one in expected]
    assert [end for _, _, end in found] == [one.finish_reason for one in expected]
    for (_, logprobs, _), one in zip(found, expected, strict=True):
        assert logprobs == pytest.approx(one.behaviour, abs=1e-5)


def test_requests_get_the_trainers_tokens_whatever_decodes_beside_them(toy_folder: Path) -> None:
    asks = [
        ASK,
        replace(ASK, prompt_ids=LONGER, seed=12, n=2, sampling=Sampling(0.7, 20, top_k=20)),
        replace(ASK, seed=13, n=1, sampling=Sampling(0.0, 6)),
        replace(ASK, seed=14, n=5, sampling=Sampling(1.0, 9, stop_ids=(20, 21, 22))),
    ]
    with decoding(toy_folder, slots=4) as (decoder, _):
        told = [Told() for _ in asks]
        for ask, one in zip(asks, told, strict=True):
            decoder.submit(ask, one)
        found = [one.rows(ask.n) for ask, one in zip(asks, told, strict=True)]
    for ask, rows in zip(asks, found, strict=True):
        compared(rows, trained(toy_folder, ask))


def test_gradually_tokens_come_as_they_are_made_and_are_the_same(toy_folder: Path) -> None:
    with decoding(toy_folder) as (decoder, _):
        whole, told = answered(decoder, ASK), Told()
        decoder.submit(replace(ASK, gradually=True), told)
        assert told.rows(3) == whole
    assert told.times >= max(len(ids) for ids, _, _ in whole)
    assert len(max(whole)[0]) > 1


@pytest.fixture
def adapters(toy_folder: Path, tmp_path: Path) -> dict[str, Path]:
    """Two saved adapters that answer otherwise than the model alone and each other."""
    model, _ = load(ModelConfig(name=str(toy_folder)))
    made = Adapters(model, AdapterConfig(rank=4), mx.random.key(0))
    folders = {"one": tmp_path / "one", "two": tmp_path / "two"}
    for number, folder in enumerate(folders.values(), start=1):
        state = made.state()
        keys = mx.random.split(mx.random.key(number), len(state))
        made.load_state(
            {p: 0.3 * mx.random.normal(a.shape, key=k) for (p, a), k in zip(state.items(), keys, strict=True)}
        )
        folder.mkdir()
        made.save(folder)
    return folders


def test_adapters_answer_by_name_each_as_the_trainer_has_it(toy_folder: Path, adapters: dict[str, Path]) -> None:
    names = ["base", "one", "two", "one", "base", "two"]
    asks = [replace(ASK, model=name, seed=seed) for seed, name in enumerate(names)]
    with decoding(toy_folder, adapters, slots=4, patience=0.0) as (decoder, _):
        told = [Told() for _ in asks]
        for ask, one in zip(asks, told, strict=True):
            decoder.submit(ask, one)
        found = [one.rows(3) for one in told]
    states = {name: dict(mx.load(str(folder / "adapters.safetensors"))) for name, folder in adapters.items()}
    for ask, rows in zip(asks, found, strict=True):
        compared(rows, trained(toy_folder, ask, states.get(ask.model)))
    same = replace(ASK, seed=0)
    answers = [trained(toy_folder, same, states.get(name)) for name in ("base", "one", "two")]
    assert len({tuple(one.token_ids for one in rows) for rows in answers}) == 3  # or nothing was shown


def test_the_adapter_unused_for_longest_is_let_go_and_read_again(toy_folder: Path, adapters: dict[str, Path]) -> None:
    model, _ = load(ModelConfig(name=str(toy_folder)))
    made, read = Adapters(model, AdapterConfig(rank=4), mx.random.key(0)), []

    class Watched:
        def names(self) -> list[str]:
            return [*adapters]

        def find(self, name: str) -> str | None:
            return name

        def folder(self, name: str) -> Path | None:
            read.append(name)
            return {**adapters, "three": adapters["one"]}.get(name)

    shelf = Shelf(made, Watched(), most=2)
    for name in ("one", "two", "one", "three", "one", "base"):
        with shelf.use(name):
            states = made.names
    assert read == ["one", "two", "three", "base"]
    assert sorted(name for name in states if name.startswith("served")) == ["served one", "served three"]


def test_an_adapter_that_is_gone_refuses_its_own_requests_alone(toy_folder: Path, adapters: dict[str, Path]) -> None:
    (adapters["two"] / "adapters.safetensors").unlink()
    with decoding(toy_folder, adapters) as (decoder, _):
        told = Told()
        decoder.submit(replace(ASK, model="two"), told)
        refusal = told.queue.get(timeout=60)
        assert isinstance(refusal, Refusal)
        assert (refusal.status, refusal.code) == (503, "model_not_loaded")
        assert "adapters.safetensors" in str(refusal)
        assert answered(decoder, replace(ASK, model="one"))


def test_a_cancelled_request_frees_its_slots(toy_folder: Path) -> None:
    endless = replace(ASK, sampling=Sampling(1.0, 100_000), n=4, gradually=True)
    with decoding(toy_folder, slots=4) as (decoder, _):
        decoder._generator.stop_ids = frozenset()
        told = Told()
        ticket = decoder.submit(endless, told)
        told.queue.get(timeout=60)
        waiting = Told()
        behind = decoder.submit(endless, waiting)
        decoder.cancel(behind)
        decoder.cancel(ticket)
        decoder.cancel(ticket)
        assert answered(decoder, replace(ASK, n=4))
        assert waiting.queue.empty()


def test_what_the_generator_raises_refuses_what_was_under_way_and_the_rest_is_served(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from grpo.generation.engine import Engine

    step, fails = Engine.step, [RuntimeError("the model broke")]

    def broken(self: Engine) -> Any:
        if fails:
            raise fails.pop()
        return step(self)

    monkeypatch.setattr(Engine, "step", broken)
    with decoding(toy_folder) as (decoder, _):
        told = Told()
        decoder.submit(ASK, told)
        refusal = told.queue.get(timeout=60)
        assert (refusal.status, refusal.code) == (500, "decoding_failed")
        assert "the model broke" not in str(refusal)
        compared(answered(decoder, ASK), trained(toy_folder, ASK))
    assert "the model broke" in caplog.text


def test_closing_refuses_what_is_under_way(toy_folder: Path) -> None:
    told = Told()
    with decoding(toy_folder) as (decoder, _):
        decoder._generator.stop_ids = frozenset()
        decoder.submit(replace(ASK, sampling=Sampling(1.0, 100_000), gradually=True), told)
        told.queue.get(timeout=60)
    last: Any = None
    while not told.queue.empty():
        last = told.queue.get()
    assert (last.status, last.code) == (503, "shutting_down")
    late = Told()
    decoder.submit(ASK, late)
    assert (late.queue.get(timeout=60).code, decoder.ended) == ("shutting_down", True)


def test_what_cannot_be_made_is_raised_where_it_was_begun() -> None:
    def make() -> DecodingLoop:
        raise UserError("there is no such model")

    with pytest.raises(UserError, match="no such model"), DecodingThread(make):
        pass


def test_others_are_not_kept_waiting_by_an_adapter_that_is_always_asked_for(
    toy_folder: Path, adapters: dict[str, Path]
) -> None:
    order: list[str] = []

    class Noted(Told):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def __call__(self, told: Any) -> None:
            if any(piece.ended for piece in told):
                order.append(self.name)
            super().__call__(told)

    def ask(name: str, seed: int, tokens: int) -> Noted:
        told = Noted(name)
        one = replace(ASK, model=name, seed=seed, n=1, sampling=Sampling(1.0, tokens))
        decoder.submit(one, told)
        return told

    with decoding(toy_folder, adapters, slots=2, patience=0.0) as (decoder, _):
        decoder._generator.stop_ids = frozenset()
        first = ask("one", 0, 200)
        asked = [first, ask("two", 1, 4), ask("base", 20, 4), *(ask("one", seed, 60) for seed in range(2, 10))]
        for told in asked:
            told.rows(1)
    assert order.index("two") <= 2  # and not after all of the others
    assert order.index("two") < order.index("base")


def test_many_streams_are_told_several_tokens_at_once_and_a_lone_one_each(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo.serving.decoder.PIECES", 1e-3)  # a piece in a quarter of an hour
    asked = [replace(ASK, n=1, seed=seed, sampling=Sampling(1.0, 60), gradually=True) for seed in range(8)]
    with decoding(toy_folder) as (decoder, _):
        decoder._generator.stop_ids = frozenset()
        alone, many = Told(), [Told() for _ in asked]
        decoder.submit(asked[0], alone)
        rows = alone.rows(1)
        for one, told in zip(asked, many, strict=True):
            decoder.submit(one, told)
        found = [told.rows(1) for told in many]
    assert alone.times == 60
    assert found[0] == rows
    assert [len(ids) for ((ids, _, _),) in found] == [60] * 8
    assert sorted(told.times for told in many)[4] == 2  # the first tokens at once, and the others with the last


def test_where_a_model_cannot_be_loaded_the_thread_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may end then, and MLX aborts it while a thread of its own lets its streams go."""
    clear = mx.clear_streams
    monkeypatch.setattr(mx, "clear_streams", lambda: (time.sleep(0.2), clear()))

    def fails() -> DecodingLoop:
        mx.eval(mx.ones(3) + 1)
        raise UserError("no such model")

    thread = DecodingThread(fails)
    with pytest.raises(UserError, match="no such model"), thread:
        pass
    assert not thread._thread.is_alive()
