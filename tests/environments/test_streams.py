"""Each seat draws what it would draw alone, by whatever function of `random` and `numpy.random`."""

import ast
import random
import threading
from pathlib import Path

import games
import numpy as np
import pytest

from grpo.config.environment import EnvironmentConfig
from grpo.environments.making import make_host
from grpo.environments.streams import CURRENT, Streams, install

DICE = EnvironmentConfig(use=f"{Path(games.__file__)}:Dice")


@pytest.fixture(scope="module")
def dice():
    host = make_host(DICE)
    yield host
    host.close()


def drawn(seat, calls: int) -> list[str]:
    """What a seat draws in calls of both kinds."""
    return [seat.call(("roll", "roll_slowly")[i % 2], {}).result().value for i in range(calls)]


def alone(host, seed: int, calls: int = 4) -> list[str]:
    (seat,) = host.seats(0, 1)
    assert seat.reset({}, seed).result().kind == "ok"
    values = drawn(seat, calls)
    seat.release()
    return values


def test_interleaved_seats_draw_what_each_draws_alone(dice) -> None:
    expected = {seed: alone(dice, seed) for seed in (1, 2)}
    assert expected[1] != expected[2]
    assert alone(dice, 1) == expected[1]
    seats = dict(zip((1, 2), dice.seats(0, 2), strict=True))
    for seed in (2, 1):
        seats[seed].reset({}, seed).result()
    got = {seed: [] for seed in seats}
    for i in range(4):
        futures = {seed: seat.call(("roll", "roll_slowly")[i % 2], {}) for seed, seat in seats.items()}
        for seed, future in futures.items():
            got[seed].append(future.result().value)
    assert got == expected


def test_they_are_seeded_as_a_researcher_would_seed_them(dice) -> None:
    seed = 2**40 + 5
    first, gauss, *_ = ast.literal_eval(alone(dice, seed, 1)[0])
    rng, numbers = random.Random(seed), np.random.RandomState(seed % 2**32)
    assert first == [rng.random(), rng.randint(0, 10**6), numbers.rand()]
    rng.shuffle(list(range(5)))
    assert gauss == rng.gauss(0, 1)


def test_other_processes_draw_the_same(dice) -> None:
    other = make_host(DICE)
    try:
        assert alone(other, 3) == alone(dice, 3)
    finally:
        other.close()


def test_every_function_of_a_module_is_dispatched_and_the_process_keeps_its_own() -> None:
    install()
    random.seed(1)
    np.random.seed(1)
    shared = random.getstate(), np.random.get_state()[1].tolist()
    streams = Streams()
    streams.seed(5)
    token = CURRENT.set(streams)
    try:
        assert random.random() == random.Random(5).random()
        assert np.random.random() == np.random.RandomState(5).random()
        random.seed(9)
        np.random.seed(9)
        draws = [random.choice(range(10**6)), random.getrandbits(32), np.random.sample(), np.random.ranf()]
        rng, numbers = random.Random(9), np.random.RandomState(9)
        assert draws == [rng.choice(range(10**6)), rng.getrandbits(32), numbers.rand(), numbers.rand()]
    finally:
        CURRENT.reset(token)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == shared
    assert random.random() == random.Random(1).random()


def test_a_thread_without_a_seat_draws_from_the_process() -> None:
    install()
    random.seed(4)
    found = []
    thread = threading.Thread(target=lambda: found.append(random.random()))
    thread.start()
    thread.join()
    assert found == [random.Random(4).random()]
