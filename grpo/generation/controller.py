"""How many tokens a step feeds: always the same number, or what pays on this machine with these rows, by measurement.

Speculation changes no token and no logprob, only how long they take. So all that is measured here may depend on time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Literal, NamedTuple

from grpo.generation.drafts import Drafts, Group
from grpo.generation.replay import Taken, replay
from grpo.generation.rows import Row
from grpo.generation.speculation import Speculation
from grpo.generation.tally import Tally

WIDTHS = (2, 4, 8)
"""Tokens that a wide step feeds each row: powers of two, because each is a trace of its own on a GPU."""

PLAN = 16
"""Steps for which a decision holds."""
PROBE = 4
"""Steps of a trial. The first one may build kernels, or come out of step with the device: its time is not counted."""
SAMPLES = 3
"""Measured steps without which nothing is known of a width."""
STALE = 512
"""Steps after which plain decoding is timed again while it is not used."""
RETRY = 4096
"""Steps after which the time of another width is no longer believed."""
WORTH, BETTER = 1.05, 1.03
"""How much faster a width must be than plain decoding, and how much faster than another one to replace it."""
HOPED = 1.1
"""How much faster an untried width must promise to be."""
AT_RISK = 0.01
"""The part of all decoding time that trials may lose."""
WATCHED = 0.005, 0.03
"""The part of all decoding time that replays may take, and the seconds that they may take besides."""
REPLAYED = 4096
"""Tokens of the rows that are replayed at once, if more than one: of long rows some stand for all."""


class Case(NamedTuple):
    """What steps are alike: greedy or not, with logprobs or not, and the number of slots, by powers of two."""

    greedy: bool
    logprobs: bool
    slots: int

    @classmethod
    def of(cls, rows: Sequence[Row | None]) -> Case | None:
        """The case of the rows in slots; None without any."""
        row = next(filter(None, rows), None)
        if row is None:
            return None
        return cls(row.stopping.sampling.temperature == 0, row.wants_logprobs, (len(rows) - 1).bit_length())

    def unlike(self, other: Case) -> float:
        """How far another case is from this one: by the slots first."""
        return abs(self.slots - other.slots) + (self.greedy != other.greedy) / 2 + (self.logprobs != other.logprobs) / 4


class Kind(NamedTuple):
    """What rows are guessed alike: greedy or not, and whether their prompt was seen before."""

    greedy: bool
    seen: bool


@dataclass(slots=True)
class Times:
    """The times of steps of one width in one case, in seconds, newest last."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    at: int = 0

    @property
    def known(self) -> float | None:
        return median(self.seconds) if len(self.seconds) >= SAMPLES else None


@dataclass(slots=True)
class Plan:
    """The width of the next `left` steps of a case."""

    width: int
    left: int


class Always:
    """Speculation with steps of one width."""

    def __init__(self, width: int) -> None:
        self.drafts, self.tally, self._width = Drafts(), Tally(), width
        self.description = (
            f"every step feeds a row {width - 1} draft{'s' if width > 2 else ''} (rollout.speculate: {width - 1})"
        )

    def width(self, rows: Sequence[Row | None]) -> int:  # noqa: ARG002  the same for all
        return self._width

    def propose(self, rows: Sequence[Row | None], width: int) -> list[list[int]]:
        return [[] if row is None else self.drafts.propose(row, width - 1) for row in rows]

    def stepped(self, rows: Sequence[Row | None], width: int, taken: Sequence[int], seconds: float) -> None:
        count = len(rows) - rows.count(None)
        self.tally.add(width, count, sum(taken), seconds)

    def ended(self, row: Row) -> None:
        self.drafts.remember(row)


class Automatic(Always):
    """Speculation where it pays.

    A width pays if a step takes more tokens than it costs time, both against a plain step. Times are those of the steps
    themselves. How many tokens a width would take is known before it is tried: now and then a group that has been
    decoded is decoded once more from its tokens (`replay`). A width that promises enough is tried for a few steps, as
    long as all trials together have lost no more than `AT_RISK` of the time.
    """

    def __init__(self) -> None:
        super().__init__(1)
        self.description = "drafts where they pay, by the times of steps on this machine (rollout.speculate: auto)"
        self._plans: dict[Case, Plan] = {}
        self._times: dict[tuple[Case, int], Times] = {}
        self._last: dict[tuple[Case, int], int] = {}  # the width of the step before, by case and number of slots
        self._taken: dict[tuple[Kind, int], Taken] = {}
        self._steps = self._turn = 0
        self._elapsed = self._lost = self._watching = 0.0
        self._cost = 5e-6  # seconds that a replay takes for a token

    def width(self, rows: Sequence[Row | None]) -> int:
        case = Case.of(rows)
        if case is None:
            return 1
        plan = self._plans.get(case)
        if plan is None or plan.left <= 0:
            plan = self._plans[case] = self._decide(case, [row for row in rows if row is not None])
        plan.left -= 1
        return plan.width

    def stepped(self, rows: Sequence[Row | None], width: int, taken: Sequence[int], seconds: float) -> None:
        case = Case.of(rows)
        if case is None:
            return
        count = len(rows) - rows.count(None)
        self._steps, self._elapsed = self._steps + 1, self._elapsed + seconds
        if self._last.get((case, len(rows))) == width:
            times = self._times.get((case, width))
            if times is None:
                times = self._times[case, width] = Times()
            times.seconds.append(seconds)
            times.at = self._steps
        self._last[case, len(rows)] = width
        plain = self._plain(case) if width > 1 else None
        self.tally.add(width, count, sum(taken), seconds, plain)
        if width > 1:
            self._lost += seconds - (plain or 0.0) * sum(taken) / count
            self._count(case, rows, width, taken)

    def ended(self, row: Row) -> None:
        super().ended(row)
        group = self.drafts.group(row.prompt)
        group.ended[row] = None
        if len(group.ended) == row.prompt.n:
            self._watch(group, list(group.ended))

    def _expected(self, case: Case, rows: Sequence[Row]) -> dict[int, float]:
        """Tokens that these rows would take in a step of each width, on average. 1 where nothing is known."""
        seen = fmean(self.drafts.group(row.prompt).seen for row in rows)
        old, new = (Kind(case.greedy, seen) for seen in (True, False))
        return {
            width: seen * (self._mean(old, width) or 1.0) + (1 - seen) * (self._mean(new, width) or 1.0)
            for width in WIDTHS
        }

    def _mean(self, kind: Kind, width: int) -> float | None:
        taken = self._taken.get((kind, width))
        return taken.mean if taken is not None else None

    def _count(self, case: Case, rows: Sequence[Row | None], width: int, taken: Sequence[int]) -> None:
        sums = {True: [0, 0], False: [0, 0]}
        for row, tokens in zip(rows, taken, strict=True):
            if row is not None:
                of = sums[self.drafts.group(row.prompt).seen]
                of[0] += tokens
                of[1] += 1
        for seen, (tokens, turns) in sums.items():
            if turns:
                self._add(Kind(case.greedy, seen), width, tokens, turns)

    def _add(self, kind: Kind, width: int, tokens: int, turns: int) -> None:
        self._taken.setdefault((kind, width), Taken()).add(tokens, turns)

    def _decide(self, case: Case, rows: Sequence[Row]) -> Plan:
        plain = self._plain(case)
        former = self._plans[case].width if case in self._plans else 1
        if plain is None:
            return Plan(1, SAMPLES + 1)
        if former > 1 and self._steps - self._times[case, 1].at > STALE:
            return Plan(1, PROBE)
        self._watch_rows(case, rows)
        speedups = self._speedups(case, self._expected(case, rows), plain)
        measured = {width: speedup for width, (speedup, known) in speedups.items() if known}
        best = max(measured, key=lambda width: measured[width] * (BETTER if width == former else 1), default=1)
        best = best if measured.get(best, 0.0) >= WORTH else 1
        hoped = {width: speedup for width, (speedup, known) in speedups.items() if not known}
        trial = max(hoped, key=lambda width: hoped[width], default=1)
        if hoped.get(trial, 0.0) >= HOPED * measured.get(best, 1.0) and self._lost <= AT_RISK * self._elapsed:
            return Plan(trial, PROBE)
        return Plan(best, PLAN)

    def _speedups(self, case: Case, tokens: Mapping[int, float], plain: float) -> dict[int, tuple[float, bool]]:
        """For each width how many times as fast as plain decoding it would be, and whether its time is measured.

        What was not measured is expected to cost, relative to a plain step, what it costs in the case that is most like
        this one; else what follows from the next narrower width; and a width of which nothing is known, nothing. Of the
        widths that are expected from others alone, only the narrowest is tried.
        """
        speedups: dict[int, tuple[float, bool]] = {}
        cost, narrower = 1.0, 1
        for width in WIDTHS:
            seconds = self._believed(case, width)
            elsewhere = None if seconds is not None else self._cost_elsewhere(case, width)
            if seconds is not None:
                cost, narrower = seconds / plain, width
            elif elsewhere is not None:
                cost, narrower = elsewhere, width
            else:
                guessed = 1 + max(0.0, cost - 1) * (width - 1) / max(narrower - 1, 1)
                speedups[width] = tokens[width] / guessed, False
                break
            speedups[width] = tokens[width] / cost, seconds is not None
        return speedups

    def _cost_elsewhere(self, case: Case, width: int) -> float | None:
        """The time of a wide step as a multiple of a plain one, in the most similar case in which it is known."""
        known = [
            (case.unlike(other), times.known / plain)
            for (other, wide), times in self._times.items()
            if wide == width and times.known is not None and (plain := self._plain(other)) is not None
        ]
        return min(known)[1] if known else None

    def _plain(self, case: Case) -> float | None:
        times = self._times.get((case, 1))
        return times.known if times is not None else None

    def _believed(self, case: Case, width: int) -> float | None:
        times = self._times.get((case, width))
        return None if times is None or self._steps - times.at > RETRY else times.known

    def _watch_rows(self, case: Case, rows: Sequence[Row]) -> None:
        """Replay a group in flight if nothing is known of its kind."""
        prompt = rows[0].prompt
        group = self.drafts.group(prompt)
        if self._mean(Kind(case.greedy, group.seen), WIDTHS[0]) is None:
            self._watch(group, [row for row in rows if row.prompt is prompt])

    def _watch(self, group: Group, rows: Sequence[Row]) -> None:
        """Replay a group, if there is time for it and it has twice the tokens that it had before."""
        tokens = sum(len(row.token_ids) for row in rows)
        if tokens < 2 * group.replayed:
            return
        if tokens > REPLAYED:
            rows = rows[: max(1, len(rows) * REPLAYED // tokens)]
        kind = Kind(rows[0].stopping.sampling.temperature == 0, group.seen)
        unknown = [width for width in WIDTHS if self._mean(kind, width) is None]
        widths = unknown or [WIDTHS[self._turn % len(WIDTHS)]]
        work = len(widths) * (sum(len(row.token_ids) for row in rows) + len(group.key))
        share, besides = WATCHED
        if self._watching + work * self._cost > besides + share * self._elapsed:
            return
        began = time.perf_counter()
        for width in widths:
            self._add(kind, width, *replay(group, rows, width))
        spent = time.perf_counter() - began
        self._cost += (spent / work - self._cost) / 4
        self._watching, self._turn, group.replayed = self._watching + spent, self._turn + 1, tokens


def speculation_of(setting: Literal["auto", "off"] | int) -> Speculation | None:
    """What a recipe's `rollout.speculate` asks for: `auto`, `off`, or so many drafts at every step."""
    if setting == "off":
        return None
    return Automatic() if setting == "auto" else Always(int(setting) + 1)
