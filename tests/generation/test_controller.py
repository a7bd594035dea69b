"""The controller on machines that are made up: what a step costs is a formula, and time is what it says."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from spoken import row_of

from grpo.generation import controller, steptimes
from grpo.generation.controller import Always, Automatic, speculation_of
from grpo.generation.rows import SharedPrompt
from grpo.generation.steptimes import StepKind

Cost = Callable[[int, int], float]
"""Seconds of a step, by slots and width."""


@dataclass
class Machine:
    """Says what it is told to say, as the generator would: as many tokens a step as the drafts get right."""

    speculation: Automatic | Always | None
    cost: Cost
    widths: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, sayings: Sequence[tuple[Sequence[int], Sequence[int]]], **how: object) -> None:
        """Decode a row for each prompt and saying, all at once."""
        rows = [row_of(SharedPrompt(prompt), **how) for prompt, _ in sayings]  # type: ignore[arg-type]
        slots = list(rows)
        while any(slots):
            width = self.speculation.width(slots) if self.speculation else 1
            drafts = self.speculation.propose(slots, width) if self.speculation else []
            while width > 1 and 1 + max(map(len, drafts)) <= width // 2:  # as wide as the drafts need
                width //= 2
            taken = [self._take(row, said, drafts[n] if drafts else []) if row else 0
                     for n, (row, (_, said)) in enumerate(zip(slots, sayings, strict=True))]  # fmt: skip
            spent = self.cost(len(slots), width)
            self.seconds += spent
            self.widths.append(width)
            if self.speculation:
                self.speculation.stepped(slots, width, taken, spent)
            for n, (row, (_, said)) in enumerate(zip(list(slots), sayings, strict=True)):
                if row is not None and len(row.token_ids) == len(said):
                    if self.speculation:
                        self.speculation.ended(row)
                    row.prompt.left = 0
                    slots[n] = None

    @staticmethod
    def _take(row, said, drafts) -> int:
        place, taken = len(row.token_ids), 1
        for draft in drafts:
            if draft != said[place + taken - 1] or place + taken == len(said):
                break
            taken += 1
        row.token_ids += said[place : place + taken]
        return taken


@dataclass
class Clock:
    """A clock that goes on by so many seconds each time it is read."""

    tick: float = 1e-6
    now: float = 0.0

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What replays look at."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def epochs(speculation: Automatic | Always | None, cost: Cost, count: int, same: bool = True) -> Machine:
    """So many epochs over the same four prompts, with the same answers each time, or others."""
    machine = Machine(speculation, cost)
    for epoch in range(count):
        base = 0 if same else 1000 * epoch
        machine.run([((n, 7), [base + 100 * n + i for i in range(60)]) for n in range(4)])
    return machine


def flat(_slots: int, width: int) -> float:
    return 0.01 * (1 + 0.02 * (width - 1))


def proportional(_slots: int, width: int) -> float:
    return 0.01 * width


def test_where_width_is_free_and_answers_come_back_it_decodes_widely() -> None:
    machine, plain = epochs(Automatic(), flat, 12), epochs(None, flat, 12)
    assert machine.widths[-5:] == [8] * 5
    assert plain.seconds / machine.seconds > 3
    gain = machine.speculation.tally.plain_seconds / machine.speculation.tally.seconds
    assert gain == pytest.approx(plain.seconds / machine.seconds, rel=0.05)


@pytest.mark.parametrize("same", [False, True])
def test_where_width_costs_what_it_brings_next_to_nothing_is_lost(same: bool) -> None:
    def dear(_slots: int, width: int) -> float:
        return 0.01 * width * 1.2

    machine, plain = epochs(Automatic(), dear, 30, same), epochs(None, dear, 30, same)
    assert machine.seconds < 1.03 * plain.seconds * 1.2 / 1.2 + 0.2 * 0.012  # the last trial may be under way


def test_where_nothing_comes_back_no_wide_step_is_tried() -> None:
    machine = epochs(Automatic(), flat, 10, same=False)
    assert set(machine.widths) == {1}


def test_of_two_widths_that_pay_the_better_is_taken() -> None:
    def costs(_slots: int, width: int) -> float:
        return 0.01 * {1: 1.0, 2: 1.1, 4: 1.3, 8: 6.0}[width]

    assert epochs(Automatic(), costs, 20).widths[-1] == 4


def test_it_goes_back_when_answers_change() -> None:
    speculation = Automatic()
    machine = epochs(speculation, flat, 10)
    assert machine.widths[-1] == 8

    def wide_is_dear(_slots: int, width: int) -> float:
        return 0.01 * (1 + 0.5 * (width - 1))

    machine = epochs(speculation, wide_is_dear, 60, same=False)
    assert machine.widths[-1] == 1


def test_what_building_a_kernel_costs_is_no_time_of_a_step() -> None:
    built: set[int] = set()

    def costs(slots: int, width: int) -> float:
        new = width not in built
        built.add(width)
        return flat(slots, width) + (0.5 if new else 0.0)

    assert epochs(Automatic(), costs, 40).widths[-1] == 8


def test_trials_wait_until_the_time_for_them_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide step that takes a second is tried once, and then not before there are two hundred seconds."""
    monkeypatch.setattr(steptimes, "RETRY", 50)

    def costs(_slots: int, width: int) -> float:
        return 0.01 if width == 1 else 1.0

    machine = epochs(Automatic(), costs, 30)
    assert sum(width > 1 for width in machine.widths) == controller.PROBE


def test_a_width_that_does_not_promise_enough_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "HOPED", 9.0)  # times as fast: no width can be
    assert set(epochs(Automatic(), free, 10).widths) == {1}


def test_nothing_is_tried_while_trials_have_lost_too_much() -> None:
    speculation = Automatic()
    speculation._lost = 10.0
    assert set(epochs(speculation, flat, 10).widths) == {1}


class Misled(Automatic):
    """Replays promise what does not come true, while `wrong`."""

    wrong = True

    def propose(self, rows, width):
        return [[10**6] * (width - 1)] * len(rows) if self.wrong else super().propose(rows, width)


def free(_slots: int, _width: int) -> float:
    return 0.01


def test_drafts_that_turn_out_wrong_are_given_up() -> None:
    machine = epochs(Misled(), free, steptimes.RETRY // 60)
    assert 1 < sum(width > 1 for width in machine.widths) <= len(controller.WIDTHS) * controller.PROBE
    assert machine.widths[-1] == 1


def test_drafts_that_were_wrong_once_are_tried_again_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steptimes, "RETRY", 600)
    speculation = Misled()
    epochs(speculation, free, 8)
    for taken in speculation._taken.values():
        taken.tokens = taken.turns = 20000  # as if for long
    speculation.wrong = False
    assert set(epochs(speculation, free, 1).widths) == {1}
    assert epochs(speculation, free, 10).widths[-1] == 8


def test_wide_steps_count_by_whether_the_prompts_were_seen() -> None:
    speculation = Automatic()
    epochs(speculation, proportional, 2)
    known, new = row_of(SharedPrompt((0, 7))), row_of(SharedPrompt((50, 51)))
    speculation.stepped([known, None, new, known], 8, [7, 0, 1, 4], 0.01)
    counts = {
        kind.seen: (taken.tokens, taken.turns) for (kind, width), taken in speculation._taken.items() if width == 8
    }
    assert counts == {True: (11, 2), False: (1, 1)}


def test_replays_wait_until_the_time_for_them_is_there() -> None:
    speculation = Automatic()
    speculation._cost = 10.0  # seconds a token
    assert set(epochs(speculation, flat, 10).widths) == {1}
    assert speculation._watching == 0


def test_replays_take_no_more_than_their_time_even_if_they_are_slower_than_thought(clock: Clock) -> None:
    clock.tick = 0.001
    speculation = Automatic()
    speculation._cost = 0.0
    epochs(speculation, proportional, 3)
    share, besides = controller.WATCHED
    assert speculation._cost > 0
    reads = 6  # after its time is over
    assert besides < speculation._watching <= besides + share * speculation._elapsed + reads * clock.tick


def test_a_row_in_flight_is_replayed_each_time_that_it_is_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(controller, "replay", lambda _, rows, *__: (0, lengths.append(len(rows[0].token_ids)) or 0))
    Machine(Automatic(), flat).run([((1, 2), list(range(400)))])
    times = lengths[:: len(controller.WIDTHS)]
    assert times[0] < 2 * controller.FEWEST
    assert len(times) >= 4
    assert all(2 * former <= later for former, later in pairwise(times))


def test_no_replay_begins_when_the_time_for_it_is_over(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "replay", lambda *_: pytest.fail("this takes time"))
    clock.tick = 10.0
    epochs(Automatic(), flat, 2)


def test_evaluation_and_training_are_cases_of_their_own() -> None:
    """Greedy rows say what they said before, sampled ones never do."""
    speculation = Automatic()
    machine = Machine(speculation, flat)
    for epoch in range(25):
        machine.run([((n, 7), [100 * n + i for i in range(60)]) for n in range(4)], temperature=0.0, logprobs=False)
        greedy = machine.widths[-1]
        machine.run([((n, 8), [10**4 * (epoch + 1) + 100 * n + i for i in range(60)]) for n in range(4)])
        sampled = machine.widths[-1]
    assert (greedy, sampled) == (8, 1)


def test_rows_of_prompts_that_are_new_do_not_count_as_rows_that_come_back() -> None:
    speculation = Automatic()
    epochs(speculation, proportional, 3)
    known, new = row_of(SharedPrompt((0, 7))), row_of(SharedPrompt((50, 51)))
    case = StepKind.of([known])
    assert case is not None
    of_known, of_new = (speculation._expected(case, [row], 8) for row in (known, new))
    assert of_known > 5
    assert of_new == pytest.approx(1, abs=0.3)
    assert speculation._expected(case, [known, new], 8) == pytest.approx((of_known + of_new) / 2)


def test_a_long_row_in_flight_is_enough_to_begin() -> None:
    """A single row that quotes itself, as `grpo generate` decodes it."""
    machine = Machine(Automatic(), flat)
    machine.run([((1, 2), list(range(40)) * 10)])
    assert machine.widths[-1] > 1


def test_plain_decoding_is_timed_again_now_and_then() -> None:
    machine = Machine(Automatic(), flat)
    machine.run([((1, 2), list(range(40)) * 300)])
    wide = machine.widths.index(8)
    later = machine.widths[wide + controller.STALE :]
    assert 1 in later
    assert later.count(1) < len(later) / 30


def test_a_machine_that_becomes_faster_is_no_gain() -> None:
    """Nor is any machine's gain more than the tokens of a row at a step."""
    speculation = Automatic()
    machine = epochs(speculation, flat, 12)
    speculation.tally.clear()
    machine = epochs(speculation, lambda slots, width: flat(slots, width) / 3, 1)
    tally, tokens = speculation.tally, 4 * 60
    assert set(machine.widths) == {8}
    assert tally.plain_seconds / tally.seconds == pytest.approx(tokens / tally.turns)


def test_plain_steps_now_and_then_tell_of_a_machine_that_becomes_slower() -> None:
    speculation = Automatic()
    machine = Machine(speculation, flat)
    machine.run([((1, 2), list(range(40)) * 60)])
    machine.cost = lambda slots, width: flat(slots, width) * 3
    machine.run([((1, 2), list(range(40)) * 60)])
    case = StepKind.of([row_of(SharedPrompt((1, 2)))])
    assert machine.widths[-1] == 8
    assert case is not None
    assert speculation._times.plain(case) == pytest.approx(0.03)


def test_empty_slots_count_for_nothing() -> None:
    speculation = Automatic()
    assert speculation.width([None, None]) == 1
    speculation.stepped([None, None], 1, [0, 0], 0.1)
    assert speculation.tally.turns == 0


def test_a_fixed_number_of_drafts_is_always_fed() -> None:
    assert set(epochs(speculation_of(3), proportional, 3).widths) == {1, 4}  # 1: there were no drafts
    assert speculation_of(3).width([row_of(SharedPrompt((1,)))]) == 4
    assert speculation_of("off") is None
    assert isinstance(speculation_of("auto"), Automatic)


@pytest.mark.parametrize("most", [1, 4])
def test_no_step_is_wider_than_memory_allows(most: int) -> None:
    free, fixed = Automatic(), speculation_of(7)
    for speculation in (free, fixed):
        speculation.most = most
        assert max(epochs(speculation, flat, 12).widths) == most
