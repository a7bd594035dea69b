"""Decides how many tokens a step feeds each row: always the same number, or the number that measurements show to pay.

Speculation changes no token and no logprob, only the time that they take. So these decisions may depend on time.

`auto` decides every `PLAN` steps, separately for each `StepKind`:
1. A width pays if its steps accept more tokens per row than they cost time, both relative to plain steps.
2. The cost is the median time of the newest steps. While wide steps run, a few plain steps now and then renew the
   time of plain steps.
3. The tokens per row are those that recent wide steps accepted. Before there are any, replays estimate them: now and
   then a decoded group is decoded again from its tokens alone (`replay`), in a small part of the time.
4. A width without a recent time is tried for `PROBE` steps if it promises to be `HOPED` times as fast as the best
   width, unless wide steps have lost more than `AT_RISK` of the time so far.
5. The fastest width runs; plain steps run if no width is `WORTH` times as fast as they are.
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
"""Number of steps for which a decision holds."""
PROBE = 4
"""Number of steps in a trial."""
STALE = 128
"""While wide steps run, plain decoding is timed again after this many steps, because machines change their speed."""
WORTH = 1.05
"""Minimum speedup over plain decoding for a width to be used."""
HOPED = 1.1
"""Minimum speedup over the best width that an untried width must promise."""
AT_RISK = 0.02
"""Fraction of all decoding time that trials may lose."""
WATCHED = 0.005, 0.01
"""Fraction of all decoding time that replays may take, and the seconds that they may take in addition."""
FEWEST = 16
"""Minimum number of tokens in a group for a replay, and minimum number of turns before wide steps are evidence."""
REPLAYED = 4096
"""Limit on the tokens of one replay. If the rows of a group are longer, only some of them are replayed."""


class DraftKind(NamedTuple):
    """Rows of one kind have similar acceptance: greedy or not, and whether their prompt was seen before."""

    greedy: bool
    seen: bool


@dataclass(slots=True)
class WidthPlan:
    """The width of the next `left` steps of one `StepKind`."""

    width: int
    left: int


class Always:
    """Speculation with steps of one width."""

    def __init__(self, width: int) -> None:
        self.drafts, self.tally, self._width = Drafts(), DraftTally(), width
        self.most = WIDEST
        """See `Speculation.most`."""

    @property
    def description(self) -> str:
        """One line for people: which steps feed drafts."""
        drafts = min(self._width, self.most) - 1
        every = f"every step feeds a row {drafts} draft{'s' if drafts > 1 else ''}"
        short = ", because memory has no room for more" if self.most < self._width else ""
        return f"{every}{short} (rollout.speculate: {self._width - 1})"

    def width(self, rows: Sequence[Row | None]) -> int:  # noqa: ARG002  the same for all rows
        return min(self._width, self.most)

    def propose(self, rows: Sequence[Row | None], width: int) -> list[list[int]]:
        return [[] if row is None else self.drafts.propose(row, width - 1) for row in rows]

    def stepped(self, rows: Sequence[Row | None], width: int, taken: Sequence[int], seconds: float) -> None:
        count = len(rows) - rows.count(None)
        self.tally.add(width, count, sum(taken), seconds)

    def ended(self, row: Row) -> None:
        self.drafts.remember(row)


class Automatic(Always):
    """Speculation where it pays: see the docstring of this file."""

    def __init__(self) -> None:
        super().__init__(1)
        self._plans: dict[StepKind, WidthPlan] = {}
        self._times = StepTimes()
        self._taken: defaultdict[tuple[DraftKind, int], Taken] = defaultdict(Taken)  # at wide steps
        self._promised: defaultdict[tuple[DraftKind, int], Taken] = defaultdict(Taken)  # by replays
        self._elapsed = self._lost = self._watching = 0.0
        self._cost = 5e-6  # seconds that a replay takes per token

    @property
    def description(self) -> str:
        return "drafts tokens when measured step times show a gain (rollout.speculate: auto)"

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
        """The mean number of tokens that these rows accept at a step of this width.

        It comes from recent wide steps of this case, or else from replays.
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
                total = sums[self.drafts.group(row.prompt).seen]
                total[0] += tokens
                total[1] += 1
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
            for seen in (True, False):  # tokens accepted long ago are no evidence
                self._taken.pop((DraftKind(case.greedy, seen), trials[0]), None)
            return WidthPlan(trials[0], PROBE)
        return WidthPlan(best, PLAN)

    def _speedups(self, case: StepKind, rows: Sequence[Row]) -> tuple[dict[int, float], dict[int, float]]:
        """The speedup of each width over plain decoding: measured for some widths, and estimated for the others.

        The cost of a width without a measured time is extrapolated linearly from the next narrower measured width.
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
        """Replay a group, in flight or ended, if there is time and it has twice the tokens of its last replay."""
        lengths = {row: len(row.token_ids) for row in rows}
        tokens, share, extra = sum(lengths.values()), *WATCHED
        if not self._widths() or tokens < max(FEWEST, 2 * sum(group.replayed.values())):
            return
        if tokens > REPLAYED:
            rows = rows[: max(1, len(rows) * REPLAYED // tokens)]
        work = len(self._widths()) * (sum(lengths[row] for row in rows) + group.background)
        left = extra + share * self._elapsed - self._watching
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
    """The largest number of tokens that a step feeds a row under this setting of `rollout.speculate`."""
    return {"off": 1, "auto": WIDEST}[setting] if isinstance(setting, str) else setting + 1


def speculation_of(setting: Literal["auto", "off"] | int) -> Speculation | None:
    """The speculation for a recipe's `rollout.speculate`: `auto`, `off`, or the number of drafts at every step."""
    if setting == "off":
        return None
    return Automatic() if setting == "auto" else Always(widest_of(setting))
