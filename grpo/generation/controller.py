"""How many tokens a step feeds: always the same number, or what pays on this machine with these rows, by measurement.

Speculation changes no token and no logprob, only how long they take. So all that is measured here may depend on time.

`auto` decides every `PLAN` steps, for steps that are alike (`StepKind`):
1. A width pays if its steps take more tokens a row than they cost time, both against plain steps.
2. The time is the median of the newest steps. While wide steps run, a few plain ones now and then renew theirs.
3. The tokens are what wide steps took of late. Before there are any, they are what replays promise: now and then a
   group that was decoded is decoded again, from its tokens alone (`replay`), in a small part of the time.
4. A width without a time of late is tried for `PROBE` steps if it promises to be `HOPED` times as fast as the best,
   unless wide steps have lost more than `AT_RISK` of the time so far.
5. The fastest width runs, or plain steps where none is `WORTH` times as fast as they are.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

from grpo.generation.drafts import Drafts, Siblings
from grpo.generation.replay import Taken, replay
from grpo.generation.rows import Row
from grpo.generation.slots import WIDEST, WIDTHS
from grpo.generation.speculation import Speculation
from grpo.generation.steptimes import SAMPLES, StepKind, StepTimes
from grpo.generation.tally import DraftTally

PLAN = 16
"""Steps for which a decision holds."""
PROBE = 4
"""Steps of a trial."""
STALE = 128
"""Steps after which plain decoding is timed again while it is not used: machines change their speed."""
WORTH = 1.05
"""How much faster a width must be than plain decoding."""
HOPED = 1.1
"""How much faster an untried width must promise to be."""
AT_RISK = 0.02
"""The part of all decoding time that trials may lose."""
WATCHED = 0.005, 0.01
"""The part of all decoding time that replays may take, and the seconds that they may take besides."""
FEWEST = 16
"""Tokens of a group without which it is not replayed, and turns without which wide steps say nothing."""
REPLAYED = 4096
"""Tokens of the rows that are replayed at once, if more than one: of long rows some stand for all."""


class DraftKind(NamedTuple):
    """What rows are guessed alike: greedy or not, and whether their prompt was seen before."""

    greedy: bool
    seen: bool


@dataclass(slots=True)
class WidthPlan:
    """The width of the next `left` steps of a case."""

    width: int
    left: int


class Always:
    """Speculation with steps of one width."""

    def __init__(self, width: int) -> None:
        self.drafts, self.tally, self._width = Drafts(), DraftTally(), width
        self.most = WIDEST
        """Tokens that a step may feed a row at the most: as many as there is memory for."""

    @property
    def description(self) -> str:
        """What it does, for a person."""
        drafts = min(self._width, self.most) - 1
        every = f"every step feeds a row {drafts} draft{'s' if drafts > 1 else ''}"
        short = ", because memory has no room for more" if self.most < self._width else ""
        return f"{every}{short} (rollout.speculate: {self._width - 1})"

    def width(self, rows: Sequence[Row | None]) -> int:  # noqa: ARG002  the same for all
        return min(self._width, self.most)

    def propose(self, rows: Sequence[Row | None], width: int) -> list[list[int]]:
        return [[] if row is None else self.drafts.propose(row, width - 1) for row in rows]

    def stepped(self, rows: Sequence[Row | None], width: int, taken: Sequence[int], seconds: float) -> None:
        count = len(rows) - rows.count(None)
        self.tally.add(width, count, sum(taken), seconds)

    def ended(self, row: Row) -> None:
        self.drafts.remember(row)


class Automatic(Always):
    """Speculation where it pays, as the head of this file tells."""

    def __init__(self) -> None:
        super().__init__(1)
        self._plans: dict[StepKind, WidthPlan] = {}
        self._times = StepTimes()
        self._taken: defaultdict[tuple[DraftKind, int], Taken] = defaultdict(Taken)  # at wide steps
        self._promised: defaultdict[tuple[DraftKind, int], Taken] = defaultdict(Taken)  # by replays
        self._elapsed = self._lost = self._watching = 0.0
        self._cost = 5e-6  # seconds that a replay takes for a token

    @property
    def description(self) -> str:
        return "drafts where they pay, by the times of steps on this machine (rollout.speculate: auto)"

    def width(self, rows: Sequence[Row | None]) -> int:
        case = StepKind.of(rows)
        if case is None:
            return 1
        plan = self._plans.get(case)
        if plan is None or plan.left <= 0:
            plan = self._plans[case] = self._decide(case, [row for row in rows if row is not None])
        plan.left -= 1
        return plan.width

    def stepped(self, rows: Sequence[Row | None], width: int, taken: Sequence[int], seconds: float) -> None:
        case = StepKind.of(rows)
        if case is None:
            return
        count = len(rows) - rows.count(None)
        self._elapsed += seconds
        self._times.add(case, len(rows), width, seconds)
        plain = self._times.plain(case) if width > 1 else None
        plain = min(plain, seconds) if plain is not None else None  # a plain step would not have taken longer
        self.tally.add(width, count, sum(taken), seconds, plain)
        if width > 1:
            self._lost += seconds - (plain or 0.0) * sum(taken) / count
            self._count(case, rows, width, taken)

    def ended(self, row: Row) -> None:
        super().ended(row)
        group = self.drafts.group(row.prompt)
        group.ended[row] = None
        if len(group.ended) >= row.prompt.n:
            self._watch(group, list(group.ended))

    def _expected(self, case: StepKind, rows: Sequence[Row], width: int) -> float:
        """Tokens that each of these rows takes at a step of this width, on average.

        Wide steps say it where this case has had them of late; before that, replays do.
        """
        tried = self._times.cost(case, width) is not None
        seen = fmean(self.drafts.group(row.prompt).seen for row in rows)
        old, new = (self._mean(DraftKind(case.greedy, seen), width, tried) for seen in (True, False))
        return seen * old + (1 - seen) * new

    def _mean(self, kind: DraftKind, width: int, tried: bool) -> float:
        taken = self._taken[kind, width]
        return (taken if tried and taken.turns >= FEWEST else self._promised[kind, width]).mean

    def _count(self, case: StepKind, rows: Sequence[Row | None], width: int, taken: Sequence[int]) -> None:
        sums = {True: [0, 0], False: [0, 0]}
        for row, tokens in zip(rows, taken, strict=True):
            if row is not None:
                of = sums[self.drafts.group(row.prompt).seen]
                of[0] += tokens
                of[1] += 1
        for seen, (tokens, turns) in sums.items():
            if turns:
                self._taken[DraftKind(case.greedy, seen), width].add(tokens, turns)

    def _decide(self, case: StepKind, rows: Sequence[Row]) -> WidthPlan:
        former = self._plans[case].width if case in self._plans else 1
        if self._times.plain(case) is None:
            return WidthPlan(1, SAMPLES + 1)
        if former > 1 and self._times.plain_age(case) > STALE:
            return WidthPlan(1, PROBE)
        self._watch(self.drafts.group(rows[0].prompt), [row for row in rows if row.prompt is rows[0].prompt])
        measured, hoped = self._speedups(case, rows)
        best = max(measured, key=lambda width: measured[width], default=1)
        best = best if measured.get(best, 0.0) >= WORTH else 1
        trials = [width for width in hoped if hoped[width] >= HOPED * measured.get(best, 1.0)]
        if trials and self._lost <= AT_RISK * self._elapsed:
            for seen in (True, False):  # what it took long ago says nothing
                self._taken.pop((DraftKind(case.greedy, seen), trials[0]), None)
            return WidthPlan(trials[0], PROBE)
        return WidthPlan(best, PLAN)

    def _speedups(self, case: StepKind, rows: Sequence[Row]) -> tuple[dict[int, float], dict[int, float]]:
        """How many times as fast as plain decoding each width is, where its time is measured, and may be elsewhere.

        A time that is not measured is taken to grow with the width as it does up to the next narrower width.
        """
        measured: dict[int, float] = {}
        hoped: dict[int, float] = {}
        slope = 0.0
        for width in self._widths():
            tokens, cost = self._expected(case, rows, width), self._times.cost(case, width)
            if cost is None:
                hoped[width] = tokens / (1 + slope * (width - 1))
            else:
                measured[width], slope = tokens / cost, max(0.0, cost - 1) / (width - 1)
        return measured, hoped

    def _widths(self) -> list[int]:
        return [width for width in WIDTHS if width <= self.most]

    def _watch(self, group: Siblings, rows: Sequence[Row]) -> None:
        """Replay a group, in flight or ended, if there is time and it has twice the tokens that it had before."""
        lengths = {row: len(row.token_ids) for row in rows}
        tokens, share, besides = sum(lengths.values()), *WATCHED
        if not self._widths() or tokens < max(FEWEST, 2 * sum(group.replayed.values())):
            return
        if tokens > REPLAYED:
            rows = rows[: max(1, len(rows) * REPLAYED // tokens)]
        work = len(self._widths()) * (sum(lengths[row] for row in rows) + group.background)
        left = besides + share * self._elapsed - self._watching
        if work * self._cost > left:
            return
        began = time.perf_counter()
        kind = DraftKind(rows[0].stopping.sampling.temperature == 0, group.seen)
        for width in self._widths():
            if time.perf_counter() < began + left:
                self._promised[kind, width].add(*replay(group, rows, width, began + left))
        spent = time.perf_counter() - began
        self._cost += (spent / work - self._cost) / 4
        self._watching, group.replayed = self._watching + spent, lengths


def widest_of(setting: Literal["auto", "off"] | int) -> int:
    """The most tokens that a step feeds a row as `rollout.speculate` asks for it."""
    return {"off": 1, "auto": WIDEST}[setting] if isinstance(setting, str) else setting + 1


def speculation_of(setting: Literal["auto", "off"] | int) -> Speculation | None:
    """What a recipe's `rollout.speculate` asks for: `auto`, `off`, or so many drafts at every step."""
    if setting == "off":
        return None
    return Automatic() if setting == "auto" else Always(widest_of(setting))
