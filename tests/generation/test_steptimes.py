"""What is known of the time of steps, by hand."""

import pytest
from spoken import row_of

from grpo.generation import steptimes
from grpo.generation.rows import SharedPrompt
from grpo.generation.steptimes import StepKind, StepTimes


def timed(*steps: tuple[StepKind, int, float]) -> StepTimes:
    """Four steps of each case and width, of which the first is not counted."""
    times = StepTimes()
    for case, width, seconds in steps:
        for part in (9.0, seconds, seconds, seconds):
            times.add(case, 2**case.slots, width, part)
    return times


SMALL, LARGE = StepKind(greedy=False, logprobs=True, slots=3), StepKind(greedy=False, logprobs=True, slots=5)


def test_rows_make_a_case() -> None:
    row = row_of(SharedPrompt((1,)), temperature=0.0, logprobs=False)
    assert StepKind.of([None, row, None]) == StepKind(greedy=True, logprobs=False, slots=2)
    assert StepKind.of([row] * 8) == StepKind(greedy=True, logprobs=False, slots=3)
    assert StepKind.of([None]) is None


def test_a_cost_is_in_plain_steps_without_the_first_of_a_width() -> None:
    times = timed((SMALL, 1, 2.0), (SMALL, 4, 3.0))
    assert times.plain(SMALL) == 2
    assert times.cost(SMALL, 4) == 1.5
    assert times.cost(SMALL, 2) is None
    assert times.plain(LARGE) is None


def test_a_cost_is_in_plain_steps_of_its_own_time() -> None:
    """The machine is twice as fast afterwards, which is no news of the wide steps."""
    times = timed((SMALL, 1, 2.0), (SMALL, 4, 3.0), (SMALL, 1, 1.0), (SMALL, 1, 1.0))
    assert times.plain(SMALL) == 1
    assert times.cost(SMALL, 4) == 1.5


def test_without_plain_steps_there_are_no_costs() -> None:
    assert timed((SMALL, 4, 3.0)).cost(SMALL, 4) is None


def test_too_few_steps_say_nothing() -> None:
    times = StepTimes()
    for _ in range(steptimes.SAMPLES):
        times.add(SMALL, 8, 1, 1.0)
    assert times.plain(SMALL) is None
    times.add(SMALL, 8, 1, 1.0)
    assert times.plain(SMALL) == 1


def test_steps_of_another_number_of_slots_come_between_without_harm() -> None:
    """As two lanes of one case take turns."""
    times = StepTimes()
    for _ in range(4):
        times.add(SMALL, 7, 1, 1.0)
        times.add(SMALL, 8, 1, 1.0)
    assert times.plain(SMALL) == 1


def test_a_cost_is_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steptimes, "RETRY", 3)
    times = timed((SMALL, 1, 1.0), (SMALL, 4, 3.0))
    assert times.cost(SMALL, 4) == 3
    for _ in range(4):
        times.add(SMALL, 8, 1, 1.0)
    assert times.cost(SMALL, 4) is None
    assert times.plain_age(SMALL) == 0
