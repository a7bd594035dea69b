"""After an error nobody but the traceback is left, and that holds no buffers and no copies of weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import mlx.core as mx
import pytest
from generation.test_merged_adapters import adapted
from generation.ways import Numbers, asked, recurrent

from grpo.backend.random import derive_key
from grpo.environments.driver import Driver
from grpo.generation.batching import Run
from grpo.generation.batchsession import BatchCachesSession
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.generation.shared import SharedPrefixSession

KEY = derive_key(0, "test")
SAMPLING = Sampling(1.0, max_tokens=400)
REQUESTS = [Request([5, 6, 7 + i], 4) for i in range(2)]


class Failed(RuntimeError):
    pass


class Text(Numbers):
    """A tokenizer that can also be streamed, without a text."""

    detokenizer = SimpleNamespace(reset=lambda: None, add_token=lambda _: None, finalize=lambda: None, last_segment="")


@contextmanager
def failing(session: type, name: str, at: int, error: type[BaseException]) -> Iterator[None]:
    """Let the session's method raise when it is called for the `at`th time."""
    original, calls = getattr(session, name), []

    def method(self, *given):
        calls.append(1)
        if len(calls) == at:
            raise error
        return original(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, name, method)
        yield


def generated(generator: Generator) -> None:
    generator.generate(REQUESTS, SAMPLING, KEY)


def streamed(generator: Generator) -> None:
    for _ in generator.stream(REQUESTS[0], SAMPLING, KEY):
        pass


def driven(generator: Generator) -> None:
    """As a rollout does it; rows are kept for other turns."""
    with Driver(generator.open(), None, SAMPLING) as driver:  # type: ignore[arg-type]
        driver.engine.submit(asked([9, 10, 11], n=4, sampling=SAMPLING, keep=True))
        driver.run(lambda: None)


def held() -> int:
    gc.collect()
    mx.clear_cache()
    return int(mx.get_active_memory())


@pytest.mark.each_value
@pytest.mark.parametrize("error", [Failed, KeyboardInterrupt])
@pytest.mark.parametrize(("name", "at"), [("logits", 5), ("admit", 1)])
@pytest.mark.parametrize("way", [generated, streamed, driven])
@pytest.mark.parametrize("lanes", [1, 2])
def test_an_error_in_decoding_holds_nothing(
    lanes: int, way: Callable[[Generator], None], name: str, at: int, error: type[BaseException]
) -> None:
    generator = Generator(adapted(), Text(), 8)  # type: ignore[arg-type]
    generator.lanes = lanes
    before = held()
    with failing(SharedPrefixSession, name, at, error), pytest.raises(error) as raised:
        way(generator)
    assert raised.value.__traceback__ is not None  # as a notebook keeps it
    assert held() - before < 2**12
    assert not any(product.lora for product in generator.decoding.decoder.blocks.products)  # type: ignore[attr-defined]
    generator.generate(REQUESTS, Sampling(1.0, max_tokens=3), KEY)  # and goes on


def test_batch_caches_hold_nothing_either() -> None:
    generator = Generator(recurrent(), Text(), 8)  # type: ignore[arg-type]
    before = held()
    with failing(BatchCachesSession, "logits", 5, Failed), pytest.raises(Failed):
        generated(generator)
    assert held() - before < 2**12


def test_copies_are_gone_where_buffers_cannot_be_made(monkeypatch) -> None:
    generator = Generator(adapted(), Text(), 8)  # type: ignore[arg-type]

    def unmade(*_: object) -> None:
        raise Failed

    with monkeypatch.context() as patch:
        patch.setattr(SharedPrefixSession, "__init__", unmade)
        with pytest.raises(Failed):
            generated(generator)
    assert not any(product.lora for product in generator.decoding.decoder.blocks.products)  # type: ignore[attr-defined]


def test_copies_that_lanes_share_are_gone_where_no_lane_has_begun(monkeypatch) -> None:
    """A lane that has begun lets go of them itself, so none may begin here."""
    generator = Generator(adapted(), Text(), 8)  # type: ignore[arg-type]
    generator.lanes = 2
    products = generator.decoding.decoder.blocks.products  # type: ignore[attr-defined]
    copied = []

    def fails(_: Run) -> None:
        copied.append(any(product.lora for product in products))
        raise Failed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", fails)
        with pytest.raises(Failed):
            generated(generator)
    assert copied
    assert all(copied)
    assert not any(product.lora for product in products)


def test_rows_of_an_abandoned_engine_are_released_and_keep_their_tokens() -> None:
    engine = Generator(adapted(), Text(), 2).open()  # type: ignore[arg-type]
    rows = engine.submit(asked([9, 10, 11], n=4, sampling=SAMPLING))
    engine.step()
    engine.park(rows[0])
    engine.abandon()
    assert {row.state for row in rows} == {"released"}
    assert rows[0].token_ids
    assert not engine.busy
    engine.close()
